//! What each tenant may have in the store.

use std::{io, sync::Arc, time::Duration};

use cofferdam_castore::{Views, grpc::Admission};
use cofferdam_rpc::Client;

use crate::{disk::Disk, quantity::show_size, telemetry::Metrics, tenants::Tenants};

/// Admits what a client puts if the disk has room, and the client is below its quota.
#[derive(Debug)]
pub(crate) struct Quotas {
    /// The disk's room.
    pub disk: Arc<Disk>,
    /// What each client has.
    pub views: Views,
    /// What each client may have.
    pub tenants: Tenants,
    /// Measures puts.
    pub metrics: Arc<Metrics>,
}

impl Admission for Quotas {
    fn may_put(&self, client: &Client, arriving: u64) -> io::Result<()> {
        self.disk.may_store()?;
        check(&self.views, &self.tenants, client, arriving)
    }

    fn ended(&self, duration: Duration) {
        self.metrics.put(duration);
    }
}

/// Whether a client may have so many bytes more in the store.
///
/// # Errors
///
/// `QuotaExceeded` if it is at its quota, or would be beyond it.
pub(crate) fn check(views: &Views, tenants: &Tenants, client: &Client, more: u64) -> io::Result<()> {
    let Some(stored) = tenants.of(client).stored else { return Ok(()) };
    let Some(usage) = views.usage(&client.to_string())? else { return Ok(()) };
    if usage.bytes.saturating_add(more.max(1)) <= stored {
        return Ok(());
    }
    let arriving = if more == 0 { String::new() } else { format!(" and {} on the way", show_size(more)) };
    let (used, stored) = (show_size(usage.bytes), show_size(stored));
    Err(io::Error::new(
        io::ErrorKind::QuotaExceeded,
        format!(
            "{client} has {used} in the store{arriving}, of {stored} that it may have ([tenants] stored); `cofferdam usage` shows it, \
             and what is not used for long enough is collected, see [gc] in the daemon's configuration"
        ),
    ))
}
