//! A daemon's clients that come later, over the network, or with large requests.

use std::{collections::HashMap, time::Duration};

use cofferdam::request::BuildRequest;
use cofferdam_castore::{
    grpc::{Peer, PeerOptions},
    proto::{Entry, FileEntry, SymlinkEntry, entry},
};
use cofferdam_proto::cofferdam::v1::{
    self as ours, build_service_client::BuildServiceClient, done::Outcome, event::Event,
};
use cofferdam_tests::{
    Cofferdam, Daemon,
    request::{encoded, shell},
    stretched,
};
use data_encoding::{BASE64, HEXLOWER};
use futures::{StreamExt as _, stream};
use tonic::{Streaming, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

type Client = BuildServiceClient<Channel>;

/// The contents of a stream of events.
#[derive(Default)]
struct Told {
    accepted: ours::Accepted,
    log: Vec<u8>,
    outcome: Option<Outcome>,
}

impl Told {
    /// Reads events until the log has this text, or to the end.
    async fn listen(&mut self, events: &mut Streaming<ours::Event>, until: Option<&str>) {
        let enough = |log: &[u8]| until.is_some_and(|text| log.windows(text.len()).any(|part| part == text.as_bytes()));
        let patience = stretched(Duration::from_secs(240));
        while !enough(&self.log) {
            let event = tokio::time::timeout(patience, events.message()).await.expect("it is told in time");
            match event.expect("the stream goes on").map(|event| event.event) {
                Some(Some(Event::Accepted(accepted))) => self.accepted = accepted,
                Some(Some(Event::Log(chunk))) => self.log.extend(chunk.data),
                Some(Some(Event::Done(done))) => self.outcome = done.outcome,
                Some(_) => {}
                None => return assert!(until.is_none(), "it ended without {until:?}"),
            }
        }
    }
}

async fn built(client: &mut Client, request: ours::BuildRequest) -> Told {
    let mut events = client.build(request).await.expect("it is accepted").into_inner();
    let mut told = Told::default();
    told.listen(&mut events, None).await;
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn running_builds_can_be_watched_followed_and_cancelled() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let mut client = Client::new(daemon.peer().raw_channel());
    let request = encoded(shell("echo 0123456789; sleep 1000", &[]));
    let request = ours::BuildRequest { request: Some(request), detached: true, ..Default::default() };
    let (mut first, mut events) = (Told::default(), client.build(request).await.unwrap().into_inner());
    first.listen(&mut events, Some("9\n")).await;
    let id = first.accepted.id;
    // The only waiting client leaves.
    drop(events);

    let watch = ours::WatchRequest { id: id.clone(), log_offset: 4, ..Default::default() };
    let (mut watcher, mut events) = (Told::default(), client.watch(watch).await.unwrap().into_inner());
    watcher.listen(&mut events, Some("9\n")).await;
    assert_eq!(watcher.accepted, ours::Accepted { id: id.clone(), joined: true, from_record: false });
    assert_eq!((watcher.log.escape_ascii().to_string(), &watcher.outcome), ("456789\\n".to_owned(), &None));

    let addr = daemon.addr();
    let builds = |arguments: &[&str]| cofferdam.start_command(["builds", "--daemon", &addr].iter().chain(arguments));
    let mut follower = builds(&["log", "-f", "--offset", "8", &id]);
    assert_eq!(follower.stdout_lines(1), ["89"]);
    assert!(follower.is_alive(), "it must follow until the build's end");
    tokio::task::block_in_place(|| {
        builds(&["cancel", &id]).end().succeeds();
        assert_eq!(follower.end().succeeds().stdout, "89\n");
    });
    watcher.listen(&mut events, None).await;
    let Some(Outcome::Failure(failure)) = watcher.outcome else { panic!("it succeeded") };
    assert_eq!(failure.reason, "interrupted");
    assert_eq!(watcher.log, b"456789\n");
    tokio::task::block_in_place(|| daemon.end().succeeds());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_on_tcp_builds_for_remote_clients() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "listen = ['127.0.0.1:0']");
    let addr = daemon.addrs(2).remove(1);
    assert!(addr.starts_with("grpc+http://127.0.0.1:"), "{addr}");
    let channel = Peer::from_addr(&addr, &PeerOptions::default()).unwrap().raw_channel();

    let mut health = HealthClient::new(channel.clone());
    for service in ["", "snix.build.v1.BuildService", "tvix.build.v1.BuildService", "cofferdam.v1.BuildService"] {
        let answer = health.check(HealthCheckRequest { service: service.to_owned() }).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
    let unknown = health.check(HealthCheckRequest { service: "cofferdam.v2".to_owned() }).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);

    let asked = |question| ServerReflectionRequest { message_request: Some(question), ..Default::default() };
    let symbol = MessageRequest::FileContainingSymbol("cofferdam.v1.BuildService.Watch".to_owned());
    let questions = stream::iter([asked(MessageRequest::ListServices(String::new())), asked(symbol)]);
    let answers = ServerReflectionClient::new(channel).server_reflection_info(questions).await.unwrap().into_inner();
    let mut answers = answers.map(|answer| answer.unwrap().message_response.unwrap()).collect::<Vec<_>>().await;
    let Some(MessageResponse::FileDescriptorResponse(files)) = answers.pop() else { panic!("{answers:?}") };
    assert!(files.file_descriptor_proto.iter().any(|file| file.windows(10).any(|part| part == b"ShellOffer")));
    let Some(MessageResponse::ListServicesResponse(services)) = answers.pop() else { panic!("{answers:?}") };
    for name in ["cofferdam.v1.BuildService", "snix.castore.v1.BlobService", "grpc.health.v1.Health"] {
        assert!(services.service.iter().any(|service| service.name == name), "{name} is not in {services:?}");
    }

    let elsewhere = Cofferdam::new();
    let input = elsewhere.file("input", "from elsewhere\n");
    let run = || elsewhere.build().without_slot().flag("--daemon", &addr).input("in", &input);
    tokio::task::block_in_place(|| {
        let built = run().output("build/out").exported().shell("cat /inputs/in > out").succeeds();
        assert_eq!(built.read("build/out"), "from elsewhere\n");
        let failed = run().switch("--keep-failed").shell("cp /inputs/in left; exit 9").build_fails("exit_code");
        let kept = failed.json()["fields"]["kept"].as_str().unwrap().to_owned();
        let to = elsewhere.files().join("kept");
        let export = |store: &[&str]| elsewhere.command(["export", &kept, to.to_str().unwrap()].iter().chain(store));
        export(&[]).exits_with(2).says("is not in the store");
        export(&["--blob-service-addr", &addr, "--directory-service-addr", &addr]).succeeds();
        assert_eq!(std::fs::read_to_string(to.join("build/left")).unwrap(), "from elsewhere\n");
        daemon.end().succeeds();
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_success_is_rebuilt_by_request_or_configuration() {
    let cofferdam = Cofferdam::new();
    let request =
        || ours::BuildRequest { request: Some(encoded(shell("echo > out", &["build/out"]))), ..Default::default() };
    let mut ids = HashMap::new();
    for (config, rebuild, from_record) in
        [("", false, false), ("", false, true), ("", true, false), ("reuse = 'off'", false, false)]
    {
        let daemon = Daemon::start(&cofferdam, config);
        let mut client = Client::new(daemon.peer().raw_channel());
        let told = built(&mut client, ours::BuildRequest { rebuild, ..request() }).await;
        assert!(matches!(told.outcome, Some(Outcome::Success(_))), "{:?}", told.outcome);
        assert_eq!(told.accepted.from_record, from_record);
        *ids.entry(told.accepted.id).or_insert(0) += 1;
        drop(client);
        tokio::task::block_in_place(|| daemon.end().succeeds());
    }
    assert_eq!(ids.len(), 3, "{ids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_ten_thousand_inputs_builds() {
    const MANY: usize = 10_000;
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let mut client = Client::new(daemon.peer().raw_channel());
    let empty = cofferdam_castore::B3Digest::EMPTY.as_slice().to_vec();
    let input = |number: usize| {
        let name = format!("{number:06}").into();
        Entry {
            entry: Some(match number % 2 {
                0 => entry::Entry::File(FileEntry { name, digest: empty.clone().into(), ..Default::default() }),
                _ => entry::Entry::Symlink(SymlinkEntry { name, target: "000000".into() }),
            }),
        }
    };
    let mut request = shell("set -- /inputs/*; echo $#; cat /inputs/009999 && echo readable", &[]);
    request.inputs = (0..MANY).map(input).collect();
    let request = ours::BuildRequest { request: Some(encoded(request)), ..Default::default() };
    let told = built(&mut client, request).await;
    assert!(matches!(told.outcome, Some(Outcome::Success(_))), "{:?}", told.outcome);
    assert_eq!(told.log.escape_ascii().to_string(), "10000\\nreadable\\n");
    drop(client);
    tokio::task::block_in_place(|| daemon.end().succeeds());
}

#[test]
fn documented_digests_are_those_of_requests() {
    const CONTEXT: &str = "cofferdam v1: digest of the deterministic encoding of a snix.build.v1.BuildRequest";
    let document = include_str!("../../docs/daemon.md");
    let (_, section) = document.split_once("### The digest of a request\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    assert!(section.replace('\n', " ").contains(CONTEXT));
    let (mut encoding, mut digests) = (String::new(), 0);
    for line in section.lines().filter_map(|line| line.strip_prefix("    ")) {
        if !line.starts_with("blake3-") {
            encoding += line;
            continue;
        }
        let bytes = HEXLOWER.decode(std::mem::take(&mut encoding).as_bytes()).unwrap();
        assert_eq!(format!("blake3-{}", BASE64.encode(&blake3::derive_key(CONTEXT, &bytes))), line);
        let request = BuildRequest::from_binary(&bytes).unwrap();
        assert_eq!(request.digest().to_string(), line);
        digests += 1;
    }
    assert_eq!(digests, 2);
}
