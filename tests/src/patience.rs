//! Time limits of tests. They suit an emulated guest on a busy host. If that host is emulated, too, one factor stretches them
//! all.

use std::{env, sync::LazyLock, time::Duration};

use cofferdam::Settings;

/// The variable with the factor, a whole number. Default: 1.
pub const SETTING: &str = "COFFERDAM_TEST_PATIENCE";

static FACTOR: LazyLock<u32> = LazyLock::new(|| {
    let set = env::var(SETTING).ok();
    set.map_or(1, |text| text.parse().unwrap_or_else(|_| panic!("{SETTING} must be a whole number, not {text:?}")))
});

/// This time, stretched.
pub fn stretched(time: Duration) -> Duration {
    time * *FACTOR
}

/// The time limit for a guest to connect, as a setting, if the default is too short.
pub(crate) fn connect_timeout() -> Option<String> {
    let patience = stretched(Settings::CONNECT_TIMEOUT);
    (patience > Settings::CONNECT_TIMEOUT).then(|| format!("{}s", patience.as_secs()))
}
