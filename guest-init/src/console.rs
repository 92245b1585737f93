//! Error messages on the guest's console, the last resort if the host can't be told.

use std::{error::Error, fs::OpenOptions, io::Write as _};

/// Logs an error with its causes.
pub(crate) fn log_error(error: &dyn Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    log(&text);
}

/// Writes to the kernel's log, at a level that the kernel parameter `quiet` lets through. The standard streams may not
/// lead to the console: its driver may be a module that was loaded after they were opened.
pub(crate) fn log(text: &str) {
    let log = OpenOptions::new().write(true).open("/dev/kmsg");
    if log.and_then(|mut log| log.write_all(format!("<3>guest-init: {text}").as_bytes())).is_err() {
        eprintln!("guest-init: {text}");
    }
}
