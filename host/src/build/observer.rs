use cofferdam_protocol::Sample;
use cofferdam_rpc::Turn;
use futures::{
    FutureExt as _,
    future::{BoxFuture, ready},
};

use super::{error::Reason, phase::Phase, standby::StandbyUse, terminal::Terminal};
use crate::network::Connection;

/// Watches a build. Called from the build's own threads; a slow observer holds the build back, it loses nothing.
pub(crate) trait Observer: Send + Sync {
    /// A phase begins.
    fn phase(&self, phase: Phase);
    /// Waits until the inputs' directories may be read. The turn is held until they have been.
    fn turn(&self) -> BoxFuture<'_, Option<Turn>> {
        ready(None).boxed()
    }
    /// The inputs' directories have been read. They take so many bytes of the host's memory until the build ends, which may
    /// be less than their limit.
    fn resolved(&self, _memory_bytes: u64) {}
    /// Whether the standby machine that the build was to have is used.
    fn standby(&self, _standby: StandbyUse) {}
    /// The command wrote these bytes to stdout or stderr: any bytes at all, at any boundary, meant by an untrusted build.
    fn log(&self, bytes: &[u8]);
    /// What the build uses while its command runs, about once a second and never more often than twice, as its guest
    /// claims.
    fn sample(&self, _sample: &Sample) {}
    /// A connection of the build's has ended, or was denied. Called from the runtime's threads, and must not wait.
    fn connection(&self, _connection: &Connection) {}
    /// A terminal for the command, or, with the reason, for a shell in the machine of the build that has failed. Asked for only if
    /// [`Options::interactive`](super::Options::interactive) or [`Options::shell`](super::Options::shell) is set, and not to be
    /// waited for: a client may come to its ends of the channels later.
    fn terminal(&self, _failure: Option<&Reason>) -> Option<Terminal> {
        None
    }
}
