//! How much of the network builds get.

/// Limits of one build, and of its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most connections at a time.
    pub connections: u32,
    /// Most connections at a time of all builds of its client.
    pub client_connections: u32,
    /// Most connections that begin in a second.
    pub opens: u32,
    /// Most names that are resolved in a second.
    pub queries: u32,
    /// Most bytes received on all connections.
    pub received_bytes: u64,
    /// Most bytes sent on all connections.
    pub sent_bytes: u64,
    /// Bytes that all connections carry in a second, both ways together.
    pub rate: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 128,
            client_connections: 512,
            opens: 250,
            queries: 250,
            received_bytes: 16 << 30,
            sent_bytes: 256 << 20,
            rate: Self::UNLIMITED_RATE,
        }
    }
}

impl Limits {
    /// Most connections of a build at a time that can be configured: the device has no more descriptors.
    pub const MAX_CONNECTIONS: u32 = 512;

    /// Most connections of all builds at a time, by default.
    pub const TOTAL_CONNECTIONS: u32 = 2048;

    /// Most that can be configured: each takes descriptors of the daemon.
    pub const MAX_TOTAL_CONNECTIONS: u32 = 16_384;

    /// No limit on [`rate`](Self::rate).
    pub const UNLIMITED_RATE: u64 = u64::MAX;

    /// Lowest rate that can be configured: with all connections that a build may have, each still moves every few minutes.
    pub const LEAST_RATE: u64 = 64 << 10;

    /// The lower one of each.
    pub(super) fn least(self, other: Self) -> Self {
        Self {
            connections: self.connections.min(other.connections),
            client_connections: self.client_connections.min(other.client_connections),
            opens: self.opens.min(other.opens),
            queries: self.queries.min(other.queries),
            received_bytes: self.received_bytes.min(other.received_bytes),
            sent_bytes: self.sent_bytes.min(other.sent_bytes),
            rate: self.rate.min(other.rate),
        }
    }
}
