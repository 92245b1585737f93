//! How long things may take: tests say what suits an emulated guest on a busy host, and where even that is emulated,
//! all of it is stretched by one factor.

use std::{env, sync::LazyLock, time::Duration};

use cofferdam::Settings;

/// Holds the factor, a whole number; 1 without it.
pub const SETTING: &str = "COFFERDAM_TEST_PATIENCE";

static FACTOR: LazyLock<u32> = LazyLock::new(|| {
    let set = env::var(SETTING).ok();
    set.map_or(1, |text| text.parse().unwrap_or_else(|_| panic!("{SETTING} must be a whole number, not {text:?}")))
});

/// This time, stretched.
pub fn stretched(time: Duration) -> Duration {
    time * *FACTOR
}

/// How long a guest may take to connect, as settings have it, where the default is too short.
pub(crate) fn connect_timeout() -> Option<String> {
    let patience = stretched(Settings::CONNECT_TIMEOUT);
    (patience > Settings::CONNECT_TIMEOUT).then(|| format!("{}s", patience.as_secs()))
}
