//! Who has builds here, and what each may have.

use cofferdam_rpc::{Client, Clients, Patterns};

/// What a client may have of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Its share of the machine's time, against those of all clients that want some. At least 1.
    pub share: u32,
    /// Most of its builds that run at once, at least 1. `None`: as many as the budget allows.
    pub running: Option<u32>,
    /// Most of its builds that wait. `None`: as many as of any client.
    pub queued: Option<usize>,
    /// Most bytes of the disk that its running builds may grow to, together.
    pub disk: Option<u64>,
}

impl Default for Terms {
    fn default() -> Self {
        Self { share: 1, running: None, queued: None, disk: None }
    }
}

/// What a tenant may have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tenant {
    /// In the queue. Its share also counts in everything else that clients take in turns.
    pub terms: Terms,
    /// Most bytes that it may have in the store, as [`cofferdam_castore::Views::usage`] counts them.
    pub stored: Option<u64>,
    /// Most bytes of the records of its finished builds and their logs. Beyond that the oldest are deleted.
    pub records: Option<u64>,
}

/// All tenants.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tenants {
    listed: Option<Patterns<Tenant>>,
    clients: Clients,
}

impl Tenants {
    /// These tenants, or without a list everyone; and the operators beside root.
    pub(crate) fn new(listed: Option<Patterns<Tenant>>, operators: Vec<Client>) -> Self {
        let shares = listed.as_ref().map(|listed| listed.map(|tenant| tenant.terms.share));
        Self { clients: Clients::new(operators, shares), listed }
    }

    /// What a client may have. Operators need no entry.
    pub(crate) fn of(&self, client: &Client) -> Tenant {
        self.listed.as_ref().and_then(|listed| listed.get(client)).copied().unwrap_or_default()
    }

    /// Who is let in, who is an operator, and everyone's share.
    pub(crate) fn clients(&self) -> &Clients {
        &self.clients
    }
}
