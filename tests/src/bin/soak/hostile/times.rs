//! How long calls of the honest tenant take.

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use tokio::time::sleep;

/// Pause between two calls.
const PAUSE: Duration = Duration::from_millis(20);

/// Sorted times of calls.
#[derive(Debug)]
pub(super) struct Times(Vec<Duration>);

impl Times {
    /// Of at least one call.
    pub(super) fn of(mut times: Vec<Duration>) -> Self {
        assert!(!times.is_empty(), "no call was made");
        times.sort_unstable();
        Self(times)
    }

    /// Makes calls, one after the other, until `is_over` says so after one.
    pub(super) async fn measure<F>(call: impl Fn() -> F, is_over: impl Fn(usize) -> bool) -> Result<Self>
    where
        F: Future<Output = Result<()>>,
    {
        let mut times = Vec::new();
        loop {
            let begun = Instant::now();
            call().await?;
            times.push(begun.elapsed());
            if is_over(times.len()) {
                return Ok(Self::of(times));
            }
            sleep(PAUSE).await;
        }
    }

    pub(super) fn median(&self) -> Duration {
        self.0[self.0.len() / 2]
    }

    pub(super) fn longest(&self) -> Duration {
        self.0[self.0.len() - 1]
    }

    /// None of these may take longer than one of `alone` usually does, by this or more.
    pub(super) fn are_delayed_by_less(&self, than: Duration, alone: &Self, what: &str) -> Result<()> {
        let delay = self.longest().saturating_sub(alone.median());
        println!("{what}: {self}; alone {alone}; the longest delay was {delay:.1?} of less than {than:?}");
        ensure!(delay < than, "{what}: the delay is too long");
        Ok(())
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} calls, median {:.1?}, longest {:.1?}", self.0.len(), self.median(), self.longest())
    }
}
