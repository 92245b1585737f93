//! What hostile tenants do.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use cofferdam_castore::{
    B3Digest,
    proto::{Entry, FileEntry, entry},
};
use cofferdam_proto::{
    EncodedRequest,
    cofferdam::v1::{
        self as ours, BuildRequest, LogRequest, build_service_client::BuildServiceClient, done::Outcome, event::Event,
    },
};
use cofferdam_tests::request::{encoded, shell};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    task::{AbortHandle, JoinHandle},
    time::{sleep, timeout},
};
use tonic::transport::Channel;

use super::tenant::Tenant;

/// Connections of one attack.
const CONNECTIONS: usize = 2;

/// Calls that are in progress on each: fewer than a server allows.
const CALLS: usize = 100;

/// Connections that a silent tenant tries to have: as many as one client gets.
const SILENT: usize = 320;

/// How long a silent tenant waits before it takes the place of a connection that was closed.
const AGAIN: Duration = Duration::from_secs(1);

/// Calls of a tenant, many at a time.
pub(super) struct Attack {
    task: JoinHandle<Result<()>>,
    answered: Arc<AtomicUsize>,
}

impl Attack {
    /// Makes so many calls, which get their number.
    pub(super) fn start<F>(
        tenant: &Tenant,
        calls: usize,
        call: impl Fn(Channel, usize) -> F + Send + Sync + 'static,
    ) -> Result<Self>
    where
        F: Future<Output = Result<()>> + Send,
    {
        let channels = (0..CONNECTIONS).map(|_| tenant.channel()).collect::<Result<Vec<_>>>()?;
        let answered = Arc::new(AtomicUsize::new(0));
        let theirs = Arc::clone(&answered);
        let task = tenant.spawn(async move {
            let one = |number: usize| {
                let called = call(channels[number % CONNECTIONS].clone(), number);
                let answered = &theirs;
                async move {
                    called.await.with_context(|| format!("call {number}"))?;
                    answered.fetch_add(1, Ordering::Relaxed);
                    anyhow::Ok(())
                }
            };
            stream::iter(0..calls).map(one).buffer_unordered(CONNECTIONS * CALLS).try_collect::<()>().await
        });
        Ok(Self { task, answered })
    }

    pub(super) fn watch(&self) -> AbortHandle {
        self.task.abort_handle()
    }

    /// Waits until all calls are answered.
    pub(super) async fn finished(self) -> Result<()> {
        self.task.await?
    }

    /// Ends it before all calls are made, and returns how many were answered.
    pub(super) async fn stop(self) -> Result<usize> {
        ensure!(!self.task.is_finished(), "an attack has ended too early: {:?}", self.task.await);
        self.task.abort();
        // It was aborted.
        let _ = self.task.await;
        Ok(self.answered.load(Ordering::Relaxed))
    }
}

/// Asks for what has succeeded before.
pub(super) async fn reuse(channel: Channel, request: EncodedRequest) -> Result<()> {
    let request = BuildRequest { request: Some(request), ..Default::default() };
    let mut events = BuildServiceClient::new(channel).build(request).await?.into_inner();
    let accepted = events.message().await?.and_then(|event| event.event);
    ensure!(matches!(&accepted, Some(Event::Accepted(accepted)) if accepted.from_record), "it was told {accepted:?}");
    while events.message().await?.is_some() {}
    Ok(())
}

/// Reads the log of a build from an offset.
pub(super) async fn read_log(channel: Channel, id: String, offset: u64) -> Result<()> {
    let mut chunks = BuildServiceClient::new(channel).log(LogRequest { id, offset, follow: false }).await?.into_inner();
    let mut bytes = 0;
    while let Some(chunk) = chunks.message().await? {
        bytes += chunk.data.len();
    }
    ensure!(bytes > 0, "the log has nothing there");
    Ok(())
}

/// Leaves a record of a build that fails without a machine: it lacks an input. Returns the build's id.
pub(super) async fn leave_record(channel: Channel, number: usize) -> Result<String> {
    let mut request = shell(&format!(": {number}"), &["build/out"]);
    let digest = B3Digest::of(format!("nobody has this, {number}").as_bytes()).as_slice().to_vec().into();
    let file = entry::Entry::File(FileEntry { name: b"missing"[..].into(), digest, size: 7, executable: false });
    request.inputs.push(Entry { entry: Some(file) });
    let request = BuildRequest { request: Some(encoded(request)), ..Default::default() };
    let mut events = BuildServiceClient::new(channel).build(request).await?.into_inner();
    let mut id = None;
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Accepted(accepted)) => id = Some(accepted.id),
            Some(Event::Done(ours::Done { outcome: Some(Outcome::Failure(failure)) }))
                if failure.reason == "missing" =>
            {
                return id.context("it was not accepted");
            }
            Some(Event::Done(done)) => bail!("it ended with {done:?}"),
            _ => {}
        }
    }
    bail!("the events end before the build")
}

/// Connections without a request. One that is closed is made again.
pub(super) struct Silence {
    tasks: Vec<JoinHandle<()>>,
    held: Arc<AtomicUsize>,
}

impl Silence {
    /// As many connections of each tenant as it gets.
    pub(super) fn of<'a>(tenants: impl IntoIterator<Item = &'a Tenant>) -> Self {
        let (mut tasks, held) = (Vec::new(), Arc::new(AtomicUsize::new(0)));
        for tenant in tenants {
            for _ in 0..SILENT {
                let (socket, held) = (tenant.socket.clone(), Arc::clone(&held));
                tasks.push(tenant.spawn(async move {
                    loop {
                        if let Ok(connection) = UnixStream::connect(&socket).await {
                            be_silent(connection, &held).await;
                        }
                        sleep(AGAIN).await;
                    }
                }));
            }
        }
        Self { tasks, held }
    }

    /// Waits until so many are open.
    pub(super) async fn wait_for(&self, connections: usize) -> Result<()> {
        let enough = async {
            while self.held.load(Ordering::Relaxed) < connections {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = timeout(Duration::from_secs(60), enough).await;
        waited.with_context(|| format!("of {connections} silent connections {:?} are open", self.held))
    }

    pub(super) async fn end(self) {
        for task in self.tasks {
            task.abort();
            // It was aborted.
            let _ = task.await;
        }
    }
}

/// Says what begins HTTP/2, and waits for the daemon to close the connection.
async fn be_silent(mut connection: UnixStream, held: &Arc<AtomicUsize>) {
    /// Counts a connection until it is closed or given up.
    struct Held<'a>(&'a AtomicUsize);
    impl Drop for Held<'_> {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
    // It may have been closed already.
    let _ = connection.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    let mut counted = None;
    while matches!(connection.read(&mut [0; 1024]).await, Ok(1..)) {
        counted.get_or_insert_with(|| {
            held.fetch_add(1, Ordering::Relaxed);
            Held(held)
        });
    }
}
