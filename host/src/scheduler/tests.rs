//! The scheduler with real records. Its builds run for ever, since the store of their input never answers.

mod counts;

use std::{fs, io, path::Path};

use cofferdam_castore::{
    Directory, Node,
    directoryservice::{DirectoryPutter, DirectoryService},
    proto::{Entry, EntryExt as _},
    views::Grants,
};
use cofferdam_images::Image;
use cofferdam_proto::snix::build::v1 as proto;
use cofferdam_protocol::WindowSize;
use cofferdam_rpc::{Clients, MemoryPermit, Pattern, Patterns};
use futures::{
    FutureExt as _, StreamExt as _,
    future::pending,
    stream::{self, BoxStream},
};
use opentelemetry::Context;
use tokio::{io::AsyncWriteExt as _, sync::mpsc, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tonic::async_trait;

use super::*;
use crate::{
    build::{
        Options, Settings, Terminal,
        secrets::{Secret, Secrets},
    },
    limits::Limits,
    machine::vmm,
    provenance::SigningKey,
    records::{End, Outcome, Output, Recording, Retention},
    request::BuildRequest,
    scheduler::queue::Waiting,
    tenants::{Tenant, Terms},
};

const OWNER: Client = Client::User(u32::MAX - 1);
const JOINED: Client = Client::User(u32::MAX - 2);
const STRANGER: Client = Client::User(u32::MAX - 3);
const OPERATOR: Client = Client::User(OPERATORS_UID);
const OPERATORS_UID: u32 = u32::MAX - 4;

/// A directory service that never answers.
struct Silent;

#[async_trait]
impl DirectoryService for Silent {
    async fn get(&self, _: &B3Digest) -> io::Result<Option<Directory>> {
        pending().await
    }

    async fn put(&self, _: Directory) -> io::Result<B3Digest> {
        pending().await
    }

    fn get_recursive(&self, _: &B3Digest) -> BoxStream<'_, io::Result<Directory>> {
        stream::pending().boxed()
    }

    fn put_multiple_start(&self) -> Box<dyn DirectoryPutter + '_> {
        unreachable!("nothing is put")
    }
}

const OPERATORS: [Client; 2] = [Client::User(0), OPERATOR];

fn backend(dir: &Path) -> Backend {
    for name in ["kernel", "initramfs", "scratch.ext4"] {
        fs::write(dir.join(name), name).unwrap();
    }
    let choice = vmm::choose(None).expect("images/setup.sh installs QEMU");
    let machine = Machine::from(&choice);
    let settings = Settings::new(Image::open(dir).unwrap(), choice, dir.join("run"));
    let store = Store { directories: Arc::new(Silent), ..Store::memory() };
    let tenants = Tenants::new(None, vec![OPERATOR]);
    Backend {
        builder: Arc::new(Builder::new(store.clone(), settings).unwrap()),
        views: Views::whole(store.clone()),
        store,
        records: Records::open(&dir.join("records"), Retention::default()).unwrap(),
        machine,
        operators: Operators::among(tenants.clients()),
        tenants,
        signer: Signer {
            key: SigningKey::open_or_create(&dir.join("provenance.key")).unwrap(),
            host: "host".to_owned(),
        },
        disk: Arc::new(Disk::new(Vec::new(), None)),
        metrics: Arc::new(Metrics::new(dir.to_owned())),
        traces: None,
    }
}

fn start(dir: &Path) -> Scheduler {
    start_with(dir, Reuse::Shared)
}

fn start_with(dir: &Path, reuse: Reuse) -> Scheduler {
    start_on(backend(dir), reuse)
}

fn start_on(backend: Backend, reuse: Reuse) -> Scheduler {
    Scheduler::start(backend, settings(reuse), CancellationToken::new()).0
}

fn settings(reuse: Reuse) -> SchedulerSettings {
    SchedulerSettings {
        budget: Budget { memory_bytes: 1 << 40, cpus: 64, builds: 64 },
        bounds: Bounds { queued: 100, queued_per_client: 100 },
        drain_timeout: Duration::ZERO,
        reuse,
        standby: StandbySettings::default(),
    }
}

fn submission(client: &Client, outputs: &[&str]) -> Submission {
    let outputs = outputs.iter().map(ToString::to_string).collect();
    let input = Node::Directory { digest: B3Digest::of(b"input"), size: 1 };
    let message = proto::BuildRequest {
        inputs: vec![Entry::named("input".try_into().unwrap(), input)],
        command_args: vec!["x".into()],
        outputs,
        ..proto::BuildRequest::default()
    };
    let request = BuildRequest::try_from(message).unwrap();
    Submission {
        client: client.clone(),
        digest: request.digest(),
        request,
        options: Options::default(),
        detached: false,
        rebuild: false,
        compare_with: None,
        context: Context::new(),
        memory: MemoryPermit::default(),
    }
}

async fn active(scheduler: &Scheduler, submission: Submission) -> Subscription {
    match scheduler.submit(submission).await.unwrap() {
        Submitted::Active(subscription) => subscription,
        Submitted::Earlier { record, .. } => panic!("answered from {record:?}"),
    }
}

fn terminal() -> Terminal {
    let ((_, input), (output, _)) = (mpsc::channel(1), mpsc::channel(1));
    Terminal { kind: String::new(), size: WindowSize { rows: 1, columns: 1 }, input, output }
}

/// The outcome of each operation: `ok`, or the reason of its failure. Leaving comes last.
async fn tried(scheduler: &Scheduler, client: &Client, id: BuildId) -> [String; 5] {
    let word = |outcome: Result<(), Failure>| outcome.map_or_else(|failure| failure.reason, |()| "ok".to_owned());
    let list = scheduler.list(client, |_| true, None, 100).await.unwrap();
    let is_listed = list.builds.iter().any(|build| build.record.id == id);
    [
        if is_listed { "ok" } else { "unknown_build" }.to_owned(),
        word(scheduler.find(client, id).await.map(drop)),
        word(scheduler.read_log(client, id, 0).await.map(drop)),
        word(scheduler.use_shell(client, id, terminal()).await.map(drop)),
        word(scheduler.cancel(client, id).await),
    ]
}

/// For a stranger a build does not exist. Only clients that may use a shell learn that none is offered.
#[tokio::test]
async fn only_operators_and_who_asked_for_a_build_may_do_anything_with_it() {
    let all = ["ok", "ok", "ok", "no_shell", "ok"];
    let none = ["unknown_build"; 5];
    let table = [(STRANGER, none), (JOINED, all), (OWNER, all)];
    let table = || table.clone().into_iter().chain(OPERATORS.map(|operator| (operator, all)));

    let dir = tempfile::tempdir().unwrap();
    let scheduler = start(dir.path());
    for (client, expected) in table() {
        let build = active(&scheduler, submission(&OWNER, &[])).await;
        let other = active(&scheduler, submission(&JOINED, &[])).await;
        assert!(!build.joined && other.joined);
        let id = build.build.id();
        assert_eq!(tried(&scheduler, &client, id).await, expected, "an active build, {client}");
        drop(other);
        if client == JOINED {
            // It has only left. The owner still waits.
            assert!(matches!(*build.build.state().borrow(), State::Queued { .. } | State::Running { .. }));
        } else if expected == all {
            build.done().await.unwrap();
            assert_eq!(tried(&scheduler, &client, id).await, expected, "a build that was cancelled, {client}");
        }
    }
    let ended = active(&scheduler, submission(&OWNER, &[])).await;
    drop(active(&scheduler, submission(&JOINED, &[])).await);
    let id = ended.build.id();
    scheduler.cancel(&OWNER, id).await.unwrap();
    ended.done().await.unwrap();
    for (client, expected) in table() {
        assert_eq!(tried(&scheduler, &client, id).await, expected, "an ended build, {client}");
    }
    let nothing: BuildId = "00000000-0000-7000-8000-000000000000".parse().unwrap();
    for (client, _) in table() {
        assert_eq!(tried(&scheduler, &client, nothing).await, none, "no build, {client}");
    }
}

fn reason(record: &crate::records::Record) -> &str {
    match &record.outcome {
        Some(Outcome::Failed(failure)) => &failure.reason,
        outcome => panic!("{outcome:?}"),
    }
}

/// Neither the first to ask nor one who joined can end it for the other.
#[tokio::test]
async fn cancelling_ends_ones_own_wait_and_the_last_ends_the_build() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = start(dir.path());
    for (leaver, stayer) in [(OWNER, JOINED), (JOINED, OWNER)] {
        let detached = Submission { detached: true, ..submission(&OWNER, &[]) };
        let owners = active(&scheduler, detached).await;
        let joined = active(&scheduler, submission(&JOINED, &[])).await;
        let id = owners.build.id();
        assert_eq!(joined.build.id(), id);
        let (left, stays) = if leaver == OWNER { (owners, joined) } else { (joined, owners) };
        scheduler.cancel(&leaver, id).await.unwrap();
        assert_eq!(reason(&left.done().await.unwrap()), "interrupted", "{leaver}");
        assert!(!matches!(*stays.build.state().borrow(), State::Done(_)), "{stayer} still waits");
        assert!(!stays.build.cancel.is_cancelled());
        // Who has left may come back.
        let back = scheduler.find(&leaver, id).await.unwrap();
        scheduler.cancel(&stayer, id).await.unwrap();
        assert_eq!(reason(&stays.done().await.unwrap()), "interrupted");
        assert!(!stays.build.cancel.is_cancelled(), "{leaver} waits again");
        let mut state = stays.build.state();
        drop((left, stays, back));
        state.wait_for(|state| matches!(state, State::Done(_))).await.unwrap();
    }
}

#[tokio::test]
async fn only_operators_learn_who_else_asked() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = start(dir.path());
    let build = active(&scheduler, submission(&OWNER, &[])).await;
    let _joined = active(&scheduler, submission(&JOINED, &[])).await;
    for (client, named) in [(OWNER, OWNER), (JOINED, JOINED), (OPERATOR, OWNER)] {
        assert_eq!(scheduler.owner_for(&client, &build.build.record()), named.to_string());
    }
}

/// The control is a daemon that shares among all.
#[tokio::test]
async fn builds_and_results_are_shared_as_configured() {
    for (reuse, own, others) in [(Reuse::Tenant, true, false), (Reuse::Shared, true, true), (Reuse::Off, false, false)]
    {
        let dir = tempfile::tempdir().unwrap();
        let scheduler = start_with(dir.path(), reuse);
        let _build = active(&scheduler, submission(&OWNER, &[])).await;
        for (client, expected) in [(OWNER, own), (STRANGER, others)] {
            assert_eq!(active(&scheduler, submission(&client, &[])).await.joined, expected, "{reuse:?}, {client}");
        }
        record_success(&scheduler, submission(&OWNER, &["a"]), &["A"]).await;
        for (client, expected) in [(OWNER, own), (STRANGER, others)] {
            let answer = scheduler.submit(submission(&client, &["a"])).await.unwrap();
            assert_eq!(matches!(answer, Submitted::Earlier { .. }), expected, "{reuse:?}, {client}");
        }
    }
}

/// Otherwise a guess of all digests in a request would be answered with the result. The control is the test above.
#[tokio::test]
async fn who_does_not_see_the_inputs_shares_neither_builds_nor_results() {
    let dir = tempfile::tempdir().unwrap();
    let backend = backend(dir.path());
    let grants = Grants::open(&dir.path().join("grants.redb"), None).unwrap();
    let views = Views::divided(backend.store.clone(), grants);
    let scheduler = start_on(Backend { views, ..backend }, Reuse::Shared);
    record_success(&scheduler, submission(&OWNER, &["a"]), &["A"]).await;
    let builds = [OWNER, STRANGER].map(|client| active(&scheduler, submission(&client, &["a"])));
    for build in futures::future::join_all(builds).await {
        assert!(!build.joined);
        assert_eq!(reason(&build.done().await.unwrap()), "missing");
    }
}

#[tokio::test]
async fn who_has_joined_is_granted_what_the_build_made_and_nobody_joins_afterwards() {
    let [dir, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let scheduler = start(dir.path());
    let build = active(&scheduler, submission(&OWNER, &["a"])).await.build;
    assert!(build.join(&JOINED));
    let grants = Grants::open(&other.path().join("grants.redb"), None).unwrap();
    let views = Views::divided(Store::memory(), grants);
    let backend = Backend { views: views.clone(), ..backend(other.path()) };
    let blobs = views.of(&OWNER.to_string()).blobs;
    let mut digests = Vec::new();
    for contents in [b"one", b"two"] {
        let mut writer = blobs.open_write().await;
        writer.write_all(contents).await.unwrap();
        digests.push(writer.close().await.unwrap());
    }
    blobs.commit().await.unwrap();
    let node = |digest: &B3Digest| Node::File { digest: *digest, size: 3, executable: false };
    let nodes: Vec<_> = digests.iter().map(node).collect();
    run::grant(&backend, &build, &nodes).await.unwrap();
    for (client, expected) in [(OWNER, true), (JOINED, true), (STRANGER, false)] {
        for digest in &digests {
            assert_eq!(views.of(&client.to_string()).blobs.has(digest).await.unwrap(), expected, "{client}");
        }
    }
    assert!(!build.join(&STRANGER));
}

/// Not even the user that the daemon runs as.
#[test]
fn nobody_but_root_is_an_operator_whom_the_configuration_does_not_list() {
    let this = Client::User(nix::unistd::geteuid().as_raw());
    let certificate: Client = "uri:spiffe://a/admin".parse().unwrap();
    let listed = [Client::User(7), OPERATOR, certificate.clone()];
    for (listed, client, expected) in [
        (&[][..], Client::User(0), true),
        (&[], this.clone(), this == Client::User(0)),
        (&[], OPERATOR, false),
        (&listed, OPERATOR, true),
        (&listed, STRANGER, false),
        (&listed, Client::Address([127, 0, 0, 1].into()), false),
        (&listed, certificate, true),
        (&listed, "dns:admin".parse().unwrap(), false),
    ] {
        let clients = Clients::new(listed.iter().cloned(), None);
        assert_eq!(Operators::among(&clients).include(&client), expected, "{client} among {listed:?}");
    }
}

/// Records a success under the key of a submission.
async fn record_success(scheduler: &Scheduler, submission: Submission, outputs: &[&str]) -> BuildId {
    let link = |target: &&str| Node::Symlink { target: (*target).try_into().unwrap() };
    record_nodes(scheduler, submission, outputs.iter().map(link)).await
}

async fn record_nodes(
    scheduler: &Scheduler,
    submission: Submission,
    nodes: impl Iterator<Item = Node> + Send,
) -> BuildId {
    let submission = submission.admitted_by(&scheduler.backend.builder).unwrap();
    let (prepared, _) = scheduler.prepare(&submission, false).unwrap();
    let recording: Recording = scheduler.backend.records.begin(crate::records::Request {
        digest: submission.digest,
        environment: prepared.environment,
        key: prepared.key,
        client: submission.client.to_string(),
        description: String::new(),
        output_order: submission.request.output_order(),
        output_paths: Vec::new(),
        log_bytes: 1,
        secrets: Vec::new(),
    });
    let outputs = nodes.map(|node| Output { node, needles: [].into() }).collect();
    recording.finish(End { outcome: Outcome::Built(outputs), usage: None, kept: None }).unwrap();
    recording.id()
}

fn targets(record: &crate::records::Record) -> Vec<String> {
    let Some(Outcome::Built(outputs)) = &record.outcome else { panic!("{record:?}") };
    let target = |output: &Output| match &output.node {
        Node::Symlink { target } => String::from_utf8(target.as_bytes().to_vec()).unwrap(),
        node => panic!("{node:?}"),
    };
    outputs.iter().map(target).collect()
}

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_thousand_look_ups_of_one_client_delay_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = start_with(dir.path(), Reuse::Tenant);
    // The store never answers what this directory is.
    let tree = Node::Directory { digest: B3Digest::of(b"output"), size: 1 };
    record_nodes(&scheduler, submission(&OWNER, &["a"]), [tree].into_iter()).await;
    let flood = || {
        let scheduler = scheduler.clone();
        AbortOnDropHandle::new(tokio::spawn(async move { scheduler.submit(submission(&OWNER, &["a"])).await }))
    };
    let _flood: Vec<_> = (0..1000).map(|_| flood()).collect();
    while scheduler.trees.line(&OWNER).turn().now_or_never().is_some() {
        tokio::task::yield_now().await;
    }
    for client in [STRANGER, JOINED, OPERATOR] {
        timeout(LONG, active(&scheduler, submission(&client, &["a"]))).await.unwrap();
    }
}

async fn reaches(build: &Subscription, wanted: fn(&State) -> bool) {
    timeout(LONG, build.build.state().wait_for(wanted)).await.expect("it is soon").expect("the build goes on");
}

/// A scheduler of tenants that may have so much: [`OWNER`] and [`STRANGER`].
fn of_tenants(dir: &Path, tenants: [Tenant; 2]) -> Scheduler {
    let mut backend = backend(dir);
    let mut listed = Patterns::default();
    for (client, tenant) in [OWNER, STRANGER].into_iter().zip(tenants) {
        listed.insert(Pattern::Exact(client), tenant);
    }
    backend.tenants = Tenants::new(Some(listed), Vec::new());
    Scheduler::start(backend, settings(Reuse::Off), CancellationToken::new()).0
}

#[tokio::test]
async fn a_tenant_runs_as_many_builds_as_it_may_and_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let terms = Terms { running: Some(1), ..Terms::default() };
    let scheduler = of_tenants(dir.path(), [Tenant { terms, ..Tenant::default() }, Tenant::default()]);
    let first = active(&scheduler, submission(&OWNER, &[])).await;
    reaches(&first, |state| matches!(state, State::Running { .. })).await;
    let second = active(&scheduler, submission(&OWNER, &[])).await;
    let bounded = |state: &State| matches!(state, State::Queued { waiting_for: Waiting::Tenant { running: 1 }, .. });
    reaches(&second, bounded).await;
    let others = active(&scheduler, submission(&STRANGER, &[])).await;
    reaches(&others, |state| matches!(state, State::Running { .. })).await;
    scheduler.cancel(&OWNER, first.build.id()).await.unwrap();
    reaches(&second, |state| matches!(state, State::Running { .. })).await;
}

#[tokio::test]
async fn a_tenants_builds_take_no_more_of_the_disk_than_it_may_and_it_sees_what_they_take() {
    let dir = tempfile::tempdir().unwrap();
    let one = Limits::default().disk_bytes();
    let may = |disk| Tenant { terms: Terms { disk: Some(disk), ..Terms::default() }, ..Tenant::default() };
    let scheduler = of_tenants(dir.path(), [may(one), may(one - 1)]);
    let first = active(&scheduler, submission(&OWNER, &[])).await;
    reaches(&first, |state| matches!(state, State::Running { .. })).await;
    let second = active(&scheduler, submission(&OWNER, &[])).await;
    reaches(&second, |state| matches!(state, State::Queued { waiting_for: Waiting::Quota { .. }, .. })).await;
    let refused = scheduler.submit(submission(&STRANGER, &[])).await.unwrap_err();
    assert_eq!(refused.reason, "quota");
    assert!(refused.message.contains("97.00 GiB") && refused.message.contains("--scratch-size"), "{refused:?}");

    let usage = scheduler.usage(&OWNER).await.unwrap();
    let [ClientUsage { running, recorded, stored: None, .. }] = &*usage else { panic!("{usage:?}") };
    assert_eq!((running.builds, running.disk_bytes, recorded.records), (1, one, 0));
    scheduler.cancel(&OWNER, first.build.id()).await.unwrap();
    reaches(&second, |state| matches!(state, State::Running { .. })).await;
    timeout(LONG, first.done()).await.unwrap().unwrap();
    let recorded = scheduler.usage(&OWNER).await.unwrap()[0].recorded;
    assert!(recorded.records == 1 && recorded.bytes > 0, "{recorded:?}");
    let [stranger] = &*scheduler.usage(&STRANGER).await.unwrap() else { panic!("it sees itself alone") };
    assert_eq!((stranger.running, stranger.recorded.records), (Load::default(), 0));
    let all = scheduler.usage(&OPERATOR).await.unwrap();
    assert_eq!(all.iter().map(|usage| usage.client.clone()).collect::<Vec<_>>(), [OWNER.to_string()]);
}

#[tokio::test]
async fn a_thousand_questions_of_one_client_delay_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = start(dir.path());
    let build = active(&scheduler, submission(&STRANGER, &[])).await;
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = Arc::new(std::sync::Mutex::new(held));
    let flood = || {
        let (scheduler, held) = (scheduler.clone(), Arc::clone(&held));
        tokio::spawn(async move { scheduler.work(&OWNER, move || held.lock().unwrap().recv().unwrap_err()).await })
    };
    let flood: Vec<_> = (0..1000).map(|_| flood()).collect();
    while scheduler.questions.line(&OWNER).turn().now_or_never().is_some() {
        tokio::task::yield_now().await;
    }
    let listed = timeout(LONG, scheduler.list(&STRANGER, |_| true, None, 10)).await.unwrap().unwrap();
    assert_eq!(listed.builds.len(), 1);
    let id = build.build.id();
    let mut log = timeout(LONG, scheduler.read_log(&STRANGER, id, 0)).await.unwrap().unwrap();
    assert_eq!(timeout(LONG, log.available()).await.unwrap().unwrap(), None);
    timeout(LONG, active(&scheduler, submission(&JOINED, &["b"]))).await.unwrap();
    drop(release);
    for call in flood {
        call.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_reused_success_is_reordered_and_named_only_to_its_clients() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = start(dir.path());
    record_success(&scheduler, submission(&OWNER, &["b", "a"]), &["B", "A"]).await;
    for (client, visible) in [(OWNER, true), (STRANGER, false), (OPERATOR, true)] {
        for (order, expected) in [(["a", "b"], ["A", "B"]), (["b", "a"], ["B", "A"])] {
            match scheduler.submit(submission(&client, &order)).await.unwrap() {
                Submitted::Earlier { record, is_visible } => {
                    assert_eq!(targets(&record), expected);
                    assert_eq!(is_visible, visible, "{client}");
                }
                Submitted::Active(_) => panic!("it runs again"),
            }
        }
    }
}

#[tokio::test]
async fn a_build_is_compared_with_a_success_of_an_equal_request_that_its_client_may_see() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = start(dir.path());
    let earlier = record_success(&scheduler, submission(&OWNER, &["b", "a"]), &["B", "A"]).await;
    let other = record_success(&scheduler, submission(&OWNER, &[]), &[]).await;
    let check = |client: &Client, id| Submission { compare_with: Some(id), ..submission(client, &["a", "b"]) };
    let first = active(&scheduler, check(&OWNER, earlier)).await;
    let second = active(&scheduler, check(&OWNER, earlier)).await;
    assert!(!first.joined && !second.joined);
    let expected = first.build.expected.as_deref().unwrap();
    assert_eq!(expected, ["A", "B"].map(|target| Node::Symlink { target: target.try_into().unwrap() }));
    for (client, id, reason, why) in [
        (OWNER, other, "not_comparable", "another request"),
        (OWNER, first.build.id(), "not_comparable", "it has not ended"),
        (STRANGER, earlier, "unknown_build", ""),
    ] {
        let failure = scheduler.submit(check(&client, id)).await.unwrap_err();
        assert_eq!(failure.reason, reason);
        assert!(failure.message.contains(why), "{}", failure.message);
    }
}

/// What decides such a build is in no digest.
#[tokio::test]
async fn a_build_with_secrets_joins_no_other_and_its_success_is_not_reused() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = start(dir.path());
    let with_secret = || {
        let secret = Secret { name: "token".to_owned(), contents: b"s".to_vec().into() };
        let options = Options { secrets: Secrets::new(vec![secret]).unwrap(), ..Options::default() };
        Submission { options, ..submission(&OWNER, &[]) }
    };
    record_success(&scheduler, with_secret(), &[]).await;
    let first = active(&scheduler, with_secret()).await;
    let second = active(&scheduler, with_secret()).await;
    let without = active(&scheduler, submission(&OWNER, &[])).await;
    let again = active(&scheduler, submission(&OWNER, &[])).await;
    assert!(!first.joined && !second.joined && !without.joined && again.joined);
    let secrets = [&first, &without].map(|subscription| subscription.build.record().secrets);
    assert_eq!(secrets, [vec!["token".to_owned()], vec![]]);
}

#[tokio::test]
async fn a_success_is_reused_only_in_an_equal_environment() {
    let dir = tempfile::tempdir().unwrap();
    let scheduler = start(dir.path());
    let id = record_success(&scheduler, submission(&OWNER, &[]), &[]).await;
    let answered = scheduler.submit(submission(&OWNER, &[])).await.unwrap();
    assert!(matches!(answered, Submitted::Earlier { record, .. } if record.id == id));
    let initramfs = dir.path().join("initramfs");
    let padded = [fs::read(&initramfs).unwrap(), vec![0; 512]].concat();
    fs::write(&initramfs, padded).unwrap();
    drop(active(&scheduler, submission(&OWNER, &[])).await);
}
