//! Puts in progress, and who may have more of them.

use std::{
    collections::HashMap,
    fmt, io,
    sync::Arc,
    time::{Duration, Instant},
};

use cofferdam_rpc::Client;
use parking_lot::Mutex;

/// Decides whether clients may put contents into a store.
pub trait Admission: fmt::Debug + Send + Sync {
    /// Asked at the beginning of a put, and at each of its messages. All puts of the client in progress have brought `arriving`
    /// bytes. It must not block.
    ///
    /// # Errors
    ///
    /// Why this client can't put anything now. `StorageFull` and `QuotaExceeded` become RESOURCE_EXHAUSTED.
    fn may_put(&self, client: &Client, arriving: u64) -> io::Result<()>;

    /// Told when a put has succeeded or failed, and how long it took, the client's part included.
    fn ended(&self, _duration: Duration) {}
}

/// Lets all clients put.
#[derive(Debug)]
struct Everybody;

impl Admission for Everybody {
    fn may_put(&self, _: &Client, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// All puts in progress.
#[derive(Debug, Clone)]
pub struct Puts(Arc<InProgress>);

#[derive(Debug)]
struct InProgress {
    admission: Arc<dyn Admission>,
    arriving: Mutex<HashMap<Client, u64>>,
}

impl Default for Puts {
    fn default() -> Self {
        Self::new(Arc::new(Everybody))
    }
}

impl Puts {
    /// Puts of clients that this admits.
    pub fn new(admission: Arc<dyn Admission>) -> Self {
        Self(Arc::new(InProgress { admission, arriving: Mutex::default() }))
    }

    /// Begins a client's put.
    ///
    /// # Errors
    ///
    /// See [`Admission::may_put`].
    pub fn begin(&self, client: &Client) -> io::Result<Put> {
        let mut put = Put { puts: self.clone(), client: client.clone(), bytes: 0, begun: Instant::now() };
        put.more(0)?;
        Ok(put)
    }
}

/// A put in progress, until it is dropped: then the store has what it brought, or it has failed.
#[derive(Debug)]
pub struct Put {
    puts: Puts,
    client: Client,
    bytes: u64,
    begun: Instant,
}

impl Put {
    /// Asks whether it may bring so many bytes more.
    ///
    /// # Errors
    ///
    /// See [`Admission::may_put`].
    pub fn more(&mut self, bytes: u64) -> io::Result<()> {
        let InProgress { admission, arriving } = &*self.puts.0;
        let all = {
            let mut arriving = arriving.lock();
            let all = arriving.entry(self.client.clone()).or_default();
            *all = all.saturating_add(bytes);
            *all
        };
        self.bytes = self.bytes.saturating_add(bytes);
        admission.may_put(&self.client, all)
    }
}

impl Drop for Put {
    fn drop(&mut self) {
        self.puts.0.admission.ended(self.begun.elapsed());
        let mut arriving = self.puts.0.arriving.lock();
        if let Some(all) = arriving.get_mut(&self.client) {
            *all = all.saturating_sub(self.bytes);
            if *all == 0 {
                arriving.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets each client have ten bytes arriving.
    #[derive(Debug)]
    struct Ten;

    impl Admission for Ten {
        fn may_put(&self, _: &Client, arriving: u64) -> io::Result<()> {
            if arriving <= 10 { Ok(()) } else { Err(io::ErrorKind::QuotaExceeded.into()) }
        }
    }

    #[test]
    fn all_puts_of_a_client_count_together_until_they_end() {
        let puts = Puts::new(Arc::new(Ten));
        let (one, other) = (Client::User(1), Client::User(2));
        let mut first = puts.begin(&one).unwrap();
        let mut second = puts.begin(&one).unwrap();
        first.more(6).unwrap();
        assert_eq!(second.more(5).unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
        puts.begin(&other).unwrap().more(10).unwrap();
        drop(second);
        first.more(4).unwrap();
        puts.begin(&one).unwrap();
        drop(first);
        assert!(puts.0.arriving.lock().is_empty());
    }
}
