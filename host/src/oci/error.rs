use std::io;

use cofferdam_castore::archive::ArchiveError;

use super::{Digest, Platform};

/// Why an image can't be imported. Nothing of it is in the store.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OciError {
    /// A part can't be read.
    #[error("{at} can't be read")]
    Read {
        /// Which part.
        at: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A part breaks a rule of its format.
    #[error("{at} {rule}")]
    Malformed {
        /// Which part.
        at: String,
        /// The rule, as in "must be …".
        rule: String,
    },
    /// A part is not what its name says.
    #[error("{at} does not have its digest {expected}, but {found}")]
    Digest {
        /// Which part.
        at: String,
        /// Its name.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// The image is for others.
    #[error("there is no image for {wanted}: it has {}", list(.has))]
    Platform {
        /// The platform that was asked for.
        wanted: Platform,
        /// Those that there are.
        has: Vec<Platform>,
    },
    /// It has several images, and no name was given or none has it.
    #[error("there is not one image to choose: it has {}", list(.has))]
    Choice {
        /// Their names.
        has: Vec<String>,
    },
    /// A layer can't be imported.
    #[error("layer {number} of {of}")]
    Layer {
        /// Which one, from 1.
        number: usize,
        /// How many there are.
        of: usize,
        /// Why.
        #[source]
        source: ArchiveError,
    },
    /// The registry wants a login.
    #[error("the registry {host} wants a login{}", if *.had_one { ", and refuses the one in Docker's configuration" } else { "" })]
    Login {
        /// Its host.
        host: String,
        /// Whether there is one already.
        had_one: bool,
    },
    /// The registry refuses a request.
    #[error("the registry answers {status} for {what}{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What was asked for.
        what: String,
        /// What the registry says about it, after a colon.
        message: String,
    },
    /// The registry can't be reached.
    #[error("the registry {host} can't be reached")]
    Unreachable {
        /// Its host.
        host: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl OciError {
    pub(super) fn malformed(at: impl Into<String>, rule: impl Into<String>) -> Self {
        Self::Malformed { at: at.into(), rule: rule.into() }
    }
}

/// Most items of a list in a message.
const SHOWN: usize = 12;

fn list(items: &[impl ToString]) -> String {
    let mut shown: Vec<_> = items.iter().take(SHOWN).map(ToString::to_string).collect();
    if items.len() > SHOWN {
        shown.push("more".to_owned());
    }
    if shown.is_empty() { "none".to_owned() } else { shown.join(", ") }
}
