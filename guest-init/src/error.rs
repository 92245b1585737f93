//! Errors of the setup and of the session.

use std::io;

use cofferdam_protocol::{MAX_DETAIL_BYTES, Step, frame::FrameError};

use crate::boot::BootError;

/// A step of the setup failed.
#[derive(Debug, thiserror::Error)]
#[error("can't {action}")]
pub(crate) struct SetupError {
    /// The step that failed.
    pub(crate) step: Step,
    /// A verb phrase with its object.
    pub(crate) action: String,
    /// The kernel's error.
    #[source]
    pub(crate) source: io::Error,
}

/// Whether the request's path caused the error, which would then be the same on every host.
pub(crate) fn is_path_error(error: &io::Error) -> bool {
    const PATH_ERRORS: [i32; 4] = [libc::ENOTDIR, libc::EISDIR, libc::ELOOP, libc::ENAMETOOLONG];
    error.raw_os_error().is_some_and(|errno| PATH_ERRORS.contains(&errno))
}

impl SetupError {
    /// The text for the host: the action and the kernel's error, at most [`MAX_DETAIL_BYTES`].
    pub(crate) fn detail(&self) -> String {
        truncate_detail(format!("{self}: {}", self.source))
    }
}

/// Cuts a text to [`MAX_DETAIL_BYTES`].
pub(crate) fn truncate_detail(mut text: String) -> String {
    let end = (0..=MAX_DETAIL_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.truncate(end);
    text
}

/// Turns a failed system call into a [`SetupError`].
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
    /// The setup failed; the host can still be told.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The machine could not be prepared; the host can't be told.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The connection failed; the host can't be told.
    #[error("the connection to the host failed")]
    Host(#[from] FrameError),
    /// The host sent a message that the protocol does not allow at this point.
    #[error("the host sent an unexpected message instead of {expected}")]
    Unexpected {
        /// The expected message.
        expected: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detail_has_the_action_and_the_cause_and_a_limited_length() {
        let error = Err::<(), _>(nix::Error::ENOENT).context(Step::Scratch, || "open /dev/vda").unwrap_err();
        assert_eq!(error.detail(), "can't open /dev/vda: No such file or directory (os error 2)");
        let error = Err::<(), _>(nix::Error::ENOENT).context(Step::Root, || "é".repeat(4096)).unwrap_err();
        assert!(error.detail().len() <= MAX_DETAIL_BYTES);
    }
}
