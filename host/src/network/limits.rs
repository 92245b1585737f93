//! How much of the network builds get.

/// Limits of one build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most connections at a time.
    pub connections: u32,
    /// Most bytes received on all connections.
    pub received_bytes: u64,
    /// Most bytes sent on all connections.
    pub sent_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 128, received_bytes: 16 << 30, sent_bytes: 256 << 20 }
    }
}

impl Limits {
    /// Most connections at a time that can be configured: the device has no more descriptors.
    pub const MAX_CONNECTIONS: u32 = 512;

    /// The lower one of each.
    pub(super) fn least(self, other: Self) -> Self {
        Self {
            connections: self.connections.min(other.connections),
            received_bytes: self.received_bytes.min(other.received_bytes),
            sent_bytes: self.sent_bytes.min(other.sent_bytes),
        }
    }
}
