//! Why a build's machine could not be made, or its results not be told.

use std::io;

use cofferdam_protocol::{MAX_DETAIL_BYTES, Step, frame::FrameError};

/// A step of the setup failed.
#[derive(Debug, thiserror::Error)]
#[error("can't {action}")]
pub(crate) struct SetupError {
    /// The step that it belongs to.
    pub(crate) step: Step,
    /// What was tried and on what, as a verb phrase.
    pub(crate) action: String,
    /// What the kernel said.
    #[source]
    pub(crate) source: io::Error,
}

/// Whether this is the answer to a path that can't be there: an error of the request, the same on every host.
pub(crate) fn is_wrong_place(error: &io::Error) -> bool {
    const WRONG: [i32; 4] = [libc::ENOTDIR, libc::EISDIR, libc::ELOOP, libc::ENAMETOOLONG];
    error.raw_os_error().is_some_and(|errno| WRONG.contains(&errno))
}

impl SetupError {
    /// The text for the host: what was tried, then what the kernel said, cut at the protocol's limit.
    pub(crate) fn detail(&self) -> String {
        bounded(format!("{self}: {}", self.source))
    }
}

/// Cuts a text at the protocol's limit.
pub(crate) fn bounded(mut text: String) -> String {
    let end = (0..=MAX_DETAIL_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.truncate(end);
    text
}

/// Says what was tried when a system call fails during the setup.
pub(crate) trait Context<T> {
    /// `action` is a verb phrase that follows "can't".
    fn context<A: Into<String>>(self, step: Step, action: impl FnOnce() -> A) -> Result<T, SetupError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context<A: Into<String>>(self, step: Step, action: impl FnOnce() -> A) -> Result<T, SetupError> {
        self.map_err(|error| SetupError { step, action: action().into(), source: error.into() })
    }
}

/// Why a session ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// The host is told.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// Nobody is left to be told.
    #[error("the connection to the host failed")]
    Host(#[from] FrameError),
    /// The host said something that the protocol has no place for.
    #[error("the host sent another message where {expected} was due")]
    Unexpected {
        /// The message that was due.
        expected: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detail_names_the_action_and_the_cause_and_is_bounded() {
        let error = Err::<(), _>(nix::Error::ENOENT).context(Step::Scratch, || "open /dev/vda").unwrap_err();
        assert_eq!(error.detail(), "can't open /dev/vda: No such file or directory (os error 2)");
        let error = Err::<(), _>(nix::Error::ENOENT).context(Step::Root, || "é".repeat(4096)).unwrap_err();
        assert!(error.detail().len() <= MAX_DETAIL_BYTES);
    }
}
