//! Builds by a daemon for clients of snix, of tvix and of its own.

use std::{collections::HashMap, fs::File, thread, time::Duration};

use cofferdam_proto::{
    EncodedRequest,
    cofferdam::v1::{self as ours, build_service_client::BuildServiceClient, done::Outcome, event::Event},
    snix::{build::v1 as snix, castore::v1::entry::Entry as Node},
    tvix::build::v1 as tvix,
};
use cofferdam_tests::{
    Cofferdam, Daemon,
    request::{encoded, shell},
    stretched,
};
use nix::{
    libc,
    sched::{CloneFlags, unshare},
    sys::signal::Signal,
    unistd::fchdir,
};
use tonic::{
    Code, Streaming,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

type Client = BuildServiceClient<Channel>;

fn asked(script: &str) -> ours::BuildRequest {
    ours::BuildRequest { request: Some(encoded(shell(script, &[]))), ..Default::default() }
}

/// A build that is watched.
struct Watched {
    id: String,
    joined: bool,
    from_record: bool,
    events: Streaming<ours::Event>,
    log: Vec<u8>,
}

impl Watched {
    async fn start(client: &mut Client, request: ours::BuildRequest) -> Self {
        Self::of(client.build(request).await.expect("it is accepted").into_inner()).await
    }

    async fn of(mut events: Streaming<ours::Event>) -> Self {
        match events.message().await.expect("there is a first event").and_then(|event| event.event) {
            Some(Event::Accepted(ours::Accepted { id, joined, from_record })) => {
                Self { id, joined, from_record, events, log: Vec::new() }
            }
            event => panic!("the first event is {event:?}"),
        }
    }

    /// The first event of some kind.
    async fn until<T>(&mut self, mut wanted: impl FnMut(&Event, &[u8]) -> Option<T>) -> T {
        while let Some(event) = self.events.message().await.expect("the stream goes on").and_then(|event| event.event) {
            if let Event::Log(chunk) = &event {
                assert_eq!(chunk.offset, self.log.len() as u64);
                self.log.extend_from_slice(&chunk.data);
            }
            if let Some(found) = wanted(&event, &self.log) {
                return found;
            }
        }
        panic!("the stream has ended");
    }

    async fn wait_for_log(&mut self, text: &str) {
        let has = |log: &[u8]| log.windows(text.len()).any(|window| window == text.as_bytes());
        self.until(|_, log| has(log).then_some(())).await;
    }

    async fn outcome(&mut self) -> Outcome {
        let done = |event: &Event| match event {
            Event::Done(done) => done.outcome.clone(),
            _ => None,
        };
        self.until(|event, _| done(event)).await
    }

    async fn failure(&mut self) -> ours::Failure {
        match self.outcome().await {
            Outcome::Failure(failure) => failure,
            Outcome::Success(success) => panic!("it succeeded: {success:?}"),
        }
    }
}

#[tokio::test]
async fn snix_and_tvix_get_references_and_error_details() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let channel = daemon.peer().raw_channel();
    let mut snix = snix::build_service_client::BuildServiceClient::new(channel.clone());
    let mut tvix = tvix::build_service_client::BuildServiceClient::new(channel);

    let script = "mkdir -p z; echo refers to bbbb > z/one; echo aaaa > a; ln -s bbbb m";
    let mut request = shell(script, &["build/a", "build/m", "build/z/one"]);
    request.refscan_needles = vec!["aaaa".into(), "bbbb".into(), "cccc".into()];
    let answer = snix.do_build(encoded(request.clone())).await.unwrap().into_inner();
    let needles: Vec<_> = answer.outputs.iter().map(|output| output.needles.clone()).collect();
    assert_eq!(needles, [vec![0], vec![1], vec![1]]);
    let nodes: Vec<_> = answer.outputs.iter().map(|output| output.output.clone().unwrap().entry.unwrap()).collect();
    assert!(matches!(&nodes[1], Node::Symlink(link) if link.name.is_empty() && link.target == "bbbb"), "{nodes:?}");

    let answer = tvix.do_build(encoded(request.clone())).await.unwrap().into_inner();
    assert_eq!(answer.build_request.unwrap(), encoded(request.clone()));
    let names = answer.outputs.iter().map(|output| match output.entry.as_ref().unwrap() {
        Node::Directory(entry) => &entry.name,
        Node::File(entry) => &entry.name,
        Node::Symlink(entry) => &entry.name,
    });
    assert_eq!(names.collect::<Vec<_>>(), ["a", "m", "one"]);
    let needles: Vec<_> = answer.outputs_needles.into_iter().map(|found| found.needles).collect();
    assert_eq!(needles, [vec![0], vec![1], vec![1]]);

    // A request in another order is equal, and its answer has that order.
    request.outputs = ["build/z/one", "build/a", "build/m"].map(ToOwned::to_owned).into();
    let answer = snix.do_build(encoded(request.clone())).await.unwrap().into_inner();
    let needles: Vec<_> = answer.outputs.iter().map(|output| output.needles.clone()).collect();
    assert_eq!(needles, [vec![1], vec![0], vec![1]]);
    let reordered: Vec<_> = answer.outputs.into_iter().map(|output| output.output.unwrap().entry.unwrap()).collect();
    assert_eq!(reordered, [nodes[2].clone(), nodes[0].clone(), nodes[1].clone()]);
    let mut ours = Client::new(daemon.peer().raw_channel());
    let builds = ours.list(ours::ListRequest::default()).await.unwrap().into_inner().builds;
    assert_eq!(builds.len(), 1, "the three requests are one build: {builds:?}");

    let failed = snix.do_build(encoded(shell("echo out; echo err >&2; exit 7", &[]))).await.unwrap_err();
    assert_eq!(failed.code(), Code::Aborted, "{failed}");
    let info = failed.get_details_error_info().unwrap();
    assert_eq!((info.reason.as_str(), info.domain.as_str()), ("EXIT_CODE", "cofferdam"));
    assert_eq!((info.metadata["kind"].as_str(), info.metadata["exit_code"].as_str()), ("build_failed", "7"));
    assert!(!info.metadata["build_id"].is_empty());
    assert_eq!(failed.get_details_debug_info().unwrap().detail, "out\nerr");
    assert!(failed.message().ends_with("out\nerr"), "{failed}");

    let mut unsupported = shell("true", &[]);
    unsupported.constraints.as_mut().unwrap().network_access = true;
    let refused = snix.do_build(encoded(unsupported)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(refused.get_details_bad_request().unwrap().field_violations[0].field, "constraints.network_access");
    for (bytes, field) in [(b"\xff".to_vec(), "the request"), (b"\x12\x00".repeat(1 << 21), "command_args")] {
        let refused = tvix.do_build(EncodedRequest::from(bytes)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert_eq!(refused.get_details_bad_request().unwrap().field_violations[0].field, field);
    }
    // A request beyond the limits is refused before it is read.
    let huge = EncodedRequest::from(vec![0; cofferdam::request::MAX_ENCODED_BYTES + (1 << 20)]);
    let refused = tvix.do_build(huge).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    assert_eq!(refused.get_details_bad_request().unwrap().field_violations[0].field, "the request");
    daemon.end().succeeds();
}

#[tokio::test]
async fn equal_requests_share_a_build_and_a_success_is_reused() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let mut client = Client::new(daemon.peer().raw_channel());
    let request = || ours::BuildRequest {
        request: Some(encoded(shell("echo begun; sleep 5; echo made > out", &["build/out"]))),
        ..Default::default()
    };
    let mut first = Watched::start(&mut client, request()).await;
    first.wait_for_log("begun").await;
    let sample = |event: &Event| match event {
        Event::Sample(sample) => Some(*sample),
        _ => None,
    };
    let sample = first.until(|event, _| sample(event)).await;
    assert!(sample.memory_bytes > 0 && sample.processes > 0, "{sample:?}");
    let mut second = Watched::start(&mut client, request()).await;
    assert!(!first.joined && second.joined);
    assert_eq!(first.id, second.id);
    // A client that leaves doesn't affect the others, which get the whole log.
    drop(first);
    let Outcome::Success(success) = second.outcome().await else { panic!("it failed") };
    assert_eq!(second.log, b"begun\n");
    assert!(success.times.unwrap().run_us > 4_000_000 && success.usage.is_some());

    let mut again = Watched::start(&mut client, request()).await;
    assert!(again.from_record && again.id == second.id);
    assert!(matches!(again.outcome().await, Outcome::Success(again) if again.response == success.response));
    let rebuilt = Watched::start(&mut client, ours::BuildRequest { rebuild: true, ..request() }).await;
    assert!(!rebuilt.from_record && rebuilt.id != second.id);
    // A build can see its limit on processes, but not its time limit.
    let limited = |limits| ours::BuildRequest { limits: Some(limits), ..request() };
    let fewer = ours::Limits { processes: 100, ..Default::default() };
    let fewer = Watched::start(&mut client, limited(fewer)).await;
    assert!(!fewer.joined && !fewer.from_record);
    let shorter = ours::Limits { timeout_ms: 60_000, ..Default::default() };
    let shorter = Watched::start(&mut client, limited(shorter)).await;
    assert!(shorter.from_record && shorter.id == second.id);
    // A success without its output in the store is not reused.
    drop((rebuilt, fewer));
    daemon.end().succeeds();
    std::fs::remove_dir_all(cofferdam.files().join("../state/store")).unwrap();
    let daemon = Daemon::start(&cofferdam, "");
    let mut client = Client::new(daemon.peer().raw_channel());
    let anew = Watched::start(&mut client, request()).await;
    assert!(!anew.from_record);
    drop(anew);
    daemon.end().succeeds();
}

#[tokio::test]
async fn waiting_clients_know_their_place_and_leaving_cancels() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "[queue]\nmax = 2");
    let mut client = Client::new(daemon.peer().raw_channel());
    let mut running = Watched::start(&mut client, asked("echo running; sleep 1000")).await;
    running.wait_for_log("running").await;
    let mut next = Watched::start(&mut client, asked("echo next")).await;
    let mut last = Watched::start(&mut client, asked("echo last")).await;
    let queued = |event: &Event, _: &[u8]| match event {
        Event::Queued(queued) => Some(queued.clone()),
        _ => None,
    };
    let expected = ours::Queued { position: 0, waiting_for: "builds".into(), ..Default::default() };
    assert_eq!(next.until(queued).await, expected);
    last.until(|event, log| queued(event, log).filter(|queued| queued.position == 1)).await;
    let refused = client.build(asked("echo one too many")).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.get_details_retry_info().unwrap().retry_delay.unwrap() >= Duration::from_secs(1));
    assert_eq!(refused.get_details_error_info().unwrap().reason, "QUEUE_FULL");

    let active = client.list(ours::ListRequest { active: true, ..Default::default() }).await.unwrap().into_inner();
    let states: HashMap<_, _> = active.builds.iter().map(|build| (build.id.clone(), build.state())).collect();
    assert_eq!(states.len(), 3);
    assert_eq!(states[&running.id], ours::build_info::State::Running);
    assert_eq!(states[&last.id], ours::build_info::State::Queued);

    // A request cancels a waiting build. A running one is cancelled when its only client leaves.
    client.cancel(ours::CancelRequest { id: last.id.clone() }).await.unwrap();
    assert_eq!(last.failure().await.reason, "interrupted");
    let (id, mut witness) = (running.id.clone(), client.clone());
    drop(running);
    assert!(matches!(next.outcome().await, Outcome::Success(_)));
    let gone = witness.get(ours::GetRequest { id }).await.unwrap().into_inner();
    assert_eq!(gone.state(), ours::build_info::State::Failed);
    assert!(gone.ended_unix_ms >= gone.started_unix_ms && gone.started_unix_ms >= gone.submitted_unix_ms);

    // An unknown id is an error.
    for id in ["", "1", "01923456-789a-7000-8000-000000000000", &"x".repeat(4000)] {
        let refused = client.get(ours::GetRequest { id: id.to_owned() }).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{refused}");
        assert_eq!(client.cancel(ours::CancelRequest { id: id.into() }).await.unwrap_err().code(), Code::NotFound);
    }
    let long = client.get(ours::GetRequest { id: "x".repeat(100_000) }).await.unwrap_err();
    assert_eq!(long.code(), Code::InvalidArgument, "{long}");
    daemon.end().succeeds();
}

/// A connection of the user `nobody`. This changes the user of this thread only.
fn connect_as_nobody(socket_dir: &File) -> Channel {
    const NOBODY: libc::uid_t = 65534;
    // The thread gets its own working directory, since that user may not enter the directories above the socket.
    unshare(CloneFlags::CLONE_FS).expect("root may have one");
    fchdir(socket_dir).expect("it is a directory");
    // SAFETY: it changes the user of this thread alone, and takes no pointer.
    let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, NOBODY, -1) };
    assert_eq!(changed, 0, "{}", std::io::Error::last_os_error());
    Endpoint::from_static("unix:daemon.sock").connect_lazy()
}

#[tokio::test]
async fn users_see_only_their_own_builds_and_root_sees_all() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "socket_mode = 0o666");
    let mut root = Client::new(daemon.peer().raw_channel());
    let mut roots = Watched::start(&mut root, asked("echo secret")).await;
    assert!(matches!(roots.outcome().await, Outcome::Success(_)));
    let (socket_dir, id) = (File::open(cofferdam.files()).unwrap(), roots.id.clone());
    let theirs = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut nobody = Client::new(connect_as_nobody(&socket_dir));
            let mut own = Watched::start(&mut nobody, asked("echo mine")).await;
            assert!(matches!(own.outcome().await, Outcome::Success(_)));
            let refused = [
                nobody.get(ours::GetRequest { id: id.clone() }).await.map(drop),
                nobody.cancel(ours::CancelRequest { id: id.clone() }).await.map(drop),
                nobody.watch(ours::WatchRequest { id: id.clone(), ..Default::default() }).await.map(drop),
                nobody.log(ours::LogRequest { id: id.clone(), ..Default::default() }).await.map(drop),
            ];
            for refused in refused {
                assert_eq!(refused.unwrap_err().code(), Code::NotFound);
            }
            let listed = nobody.list(ours::ListRequest::default()).await.unwrap().into_inner().builds;
            assert_eq!(
                listed.iter().map(|build| (&*build.id, &*build.client)).collect::<Vec<_>>(),
                [(&*own.id, "user:65534")]
            );
            own.id
        })
    });
    let theirs = tokio::task::spawn_blocking(|| theirs.join().unwrap()).await.unwrap();
    let listed = root.list(ours::ListRequest::default()).await.unwrap().into_inner().builds;
    assert_eq!(listed.into_iter().map(|build| build.id).collect::<Vec<_>>(), [theirs, roots.id]);
    daemon.end().succeeds();
}

#[tokio::test]
async fn a_slow_log_reader_delays_nobody_and_misses_nothing() {
    const LINES: usize = 200_000;
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let mut client = Client::new(daemon.peer().raw_channel());
    let script = format!("echo begun; seq 1 {LINES}");
    let request = ours::BuildRequest { without_log: true, ..asked(&script) };
    let mut build = Watched::start(&mut client, request).await;
    let request = ours::LogRequest { id: build.id.clone(), offset: 0, follow: true };
    // The log is larger than all buffers between daemon and client, and the client reads only after the build's end.
    let mut slow = client.log(request).await.unwrap().into_inner();
    assert!(matches!(build.outcome().await, Outcome::Success(_)));
    assert!(build.log.is_empty());
    let mut log = Vec::new();
    while let Some(chunk) = slow.message().await.unwrap() {
        assert_eq!(chunk.offset, log.len() as u64);
        log.extend_from_slice(&chunk.data);
    }
    let expected: String = (1..=LINES).map(|line| format!("{line}\n")).collect();
    assert!(log == format!("begun\n{expected}").as_bytes(), "{} bytes", log.len());

    let info = client.get(ours::GetRequest { id: build.id.clone() }).await.unwrap().into_inner();
    assert_eq!(info.log_bytes, log.len() as u64);
    let part = |offset| ours::LogRequest { id: build.id.clone(), offset, follow: false };
    let mut end = client.log(part(info.log_bytes - 3)).await.unwrap().into_inner();
    assert_eq!(end.message().await.unwrap().unwrap().data, "00\n");
    let beyond = client.log(part(info.log_bytes + 1)).await.unwrap_err();
    assert_eq!(beyond.code(), Code::OutOfRange, "{beyond}");

    // The log is still available in the next daemon, compressed or not.
    daemon.end().succeeds();
    let daemon = Daemon::start(&cofferdam, "");
    let mut client = Client::new(daemon.peer().raw_channel());
    let watch = ours::WatchRequest { id: build.id.clone(), ..Default::default() };
    let mut told = Watched::of(client.watch(watch).await.unwrap().into_inner()).await;
    assert!(told.from_record && matches!(told.outcome().await, Outcome::Success(_)));
    assert!(told.log == log);
    daemon.end().succeeds();
}

#[tokio::test]
async fn clients_can_lower_limits_and_draining_lets_builds_finish() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let mut client = Client::new(daemon.peer().raw_channel());
    let limits = ours::Limits { log_bytes: 10, ..Default::default() };
    let request = ours::BuildRequest { limits: Some(limits), ..asked("echo far more than ten bytes") };
    let failure = Watched::start(&mut client, request).await.failure().await;
    assert_eq!((failure.kind(), failure.reason.as_str()), (ours::failure::Kind::BuildFailed, "limit_reached"));
    assert_eq!((failure.fields["limit"].as_str(), failure.fields["allowed"].as_str()), ("\"log_bytes\"", "10"));
    let limits = ours::Limits { timeout_ms: u64::MAX, ..Default::default() };
    let refused = client.build(ours::BuildRequest { limits: Some(limits), ..asked("true") }).await.unwrap_err();
    assert_eq!(refused.get_details_bad_request().unwrap().field_violations[0].field, "limits.timeout_ms");

    let mut running = Watched::start(&mut client, asked("echo begun; sleep 3; echo end")).await;
    running.wait_for_log("begun").await;
    let detached = ours::BuildRequest { detached: true, ..asked("echo never") };
    let mut waiting = Watched::start(&mut client, detached).await;
    daemon.running().signal(Signal::SIGTERM);
    assert_eq!(waiting.failure().await.reason, "draining");
    assert!(matches!(running.outcome().await, Outcome::Success(_)));
    assert_eq!(running.log, b"begun\nend\n");
    let outcome = daemon.end_of().succeeds();
    assert!(outcome.took < stretched(Duration::from_secs(120)), "{outcome}");
}

#[tokio::test]
async fn remote_clients_can_keep_and_inspect_failed_builds() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let mut client = Client::new(daemon.peer().raw_channel());
    let request = ours::BuildRequest { keep_failed: true, shell_ms: 120_000, ..asked("echo left > behind; exit 9") };
    let mut build = Watched::start(&mut client, request).await;
    let offer = |event: &Event| match event {
        Event::Shell(offer) => Some(offer.reason.clone()),
        _ => None,
    };
    let reason = build.until(|event, _| offer(event)).await;
    assert!(reason.contains("status 9"), "{reason}");
    let say = |input| ours::ShellInput { input: Some(input) };
    let start = ours::ShellStart { id: build.id.clone(), kind: "dumb".into(), size: None };
    let typed = "cat behind; exit\n".into();
    let inputs = [say(ours::shell_input::Input::Start(start)), say(ours::shell_input::Input::Typed(typed))];
    // The input stays open, as a terminal does.
    let inputs = futures::StreamExt::chain(futures::stream::iter(inputs), futures::stream::pending());
    let mut shown = client.shell(inputs).await.unwrap().into_inner();
    let mut screen = Vec::new();
    while let Some(output) = shown.message().await.unwrap() {
        screen.extend_from_slice(&output.data);
    }
    assert!(String::from_utf8_lossy(&screen).contains("left\r\n"), "{}", screen.escape_ascii());
    let failure = build.failure().await;
    assert_eq!((failure.reason.as_str(), failure.fields["exit_code"].as_str()), ("exit_code", "9"));
    let kept: String = serde_json::from_str(&failure.fields["kept"]).unwrap();

    let other = ours::ShellStart { id: build.id.clone(), ..Default::default() };
    let again = client.shell(futures::stream::iter([say(ours::shell_input::Input::Start(other))])).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition, "{again}");
    let nonsense = client.shell(futures::stream::iter([ours::ShellInput::default()])).await.unwrap_err();
    assert_eq!(nonsense.code(), Code::InvalidArgument, "{nonsense}");
    daemon.end().succeeds();
    let exported = cofferdam.export(&kept);
    assert_eq!(std::fs::read_to_string(exported.join("build/behind")).unwrap(), "left\n");
}

#[tokio::test]
async fn run_and_builds_work_alike_with_a_daemon() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let input = cofferdam.file("input", "from here\n");
    let build = || cofferdam.build().on(&daemon);
    let built = build().input("in", &input).output("build/out").exported().shell("cat /inputs/in | tee out");
    let built = built.succeeds().says("from here");
    assert_eq!(built.read("build/out"), "from here\n");
    let failed = build().shell("echo told >&2; exit 3").build_fails("exit_code").says("told");
    assert_eq!(failed.json()["fields"]["exit_code"], 3);
    build().output("build/../..").run(["a"]).is_refused("invalid");
    let missing = build().input_node("in", &cofferdam_tests::castore::node_of(&input)).flag("--timeout", "9999h");
    let refused = missing.shell("true").is_refused("unsupported");
    assert_eq!(refused.json()["fields"]["field"], "limits.timeout_ms");

    let addr = daemon.addr();
    let builds = |arguments: &[&str]| cofferdam.command(["builds", "--daemon", &addr].iter().chain(arguments));
    let list = builds(&["list"]).succeeds().stdout;
    let mut lines: Vec<Vec<_>> = list.lines().map(|line| line.split('\t').collect()).collect();
    // The tests' user is the daemon's user.
    assert_eq!(lines.remove(0), ["ID", "STATE", "AGE", "RAN", "CLIENT", "COMMAND"]);
    assert_eq!(lines.iter().map(|line| line[1]).collect::<Vec<_>>(), ["failed", "succeeded"]);
    let [failed, built] = [lines[0][0], lines[1][0]];
    assert_eq!(builds(&["log", built]).succeeds().stdout, "from here\n");
    assert_eq!(builds(&["log", "--offset", "5", "-f", built]).succeeds().stdout, "here\n");
    let shown = builds(&["show", "--json", failed]).succeeds().json();
    assert_eq!((&shown["state"], &shown["failure"]["reason"]), (&"failed".into(), &"exit_code".into()));
    assert!(shown["seconds"]["running"].as_f64() > Some(0.0) && shown["usage"]["peak_memory_bytes"].as_u64() > Some(0));
    let sheet = builds(&["show", built]).succeeds().stdout;
    assert!(sheet.contains("\nphases\tresolving ") && sheet.contains("\nused\tprocessor "), "{sheet}");
    let again = || build().input("in", &input).output("build/out");
    again().shell("cat /inputs/in | tee out").succeeds().says(&format!("built before, as build {built}"));
    again().switch("--rebuild").shell("cat /inputs/in | tee out").succeeds().says("from here");
    builds(&["cancel", "nothing"]).exits_with(2).says("builds list");
    daemon.end().succeeds();
    builds(&["list"]).exits_with(3).says("nobody listens at").says("try: start it with `cofferdam daemon`");
}
