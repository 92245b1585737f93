//! What people and machines are told of a build's connections, and of those that it was denied.

use std::{ffi::OsStr, fs, net::TcpListener};

use cofferdam_castore::{
    B3Digest, Node,
    proto::{Entry, EntryExt as _, FileEntry, entry},
};
use cofferdam_proto::{
    cofferdam::v1::{self as ours, build_service_client::BuildServiceClient as OurClient, event::Event},
    snix::build::v1::{BuildRequest, BuildResponse, build_service_client::BuildServiceClient as SnixClient},
};
use cofferdam_tests::{
    Cofferdam, Daemon, Lab, guest, in_network_of, networked, request,
    telemetry::{Collector, scrape},
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use serde_json::json;
use tokio::{runtime::Runtime, task::block_in_place};
use tonic::{Response, Status, Streaming};

const LAB: &str = env!("CARGO_BIN_EXE_network-lab");

/// A daemon's rules in the lab.
const CONFIG: &str = "[network]\nallow = ['good.example']\nresolvers = ['10.0.0.53:53']\n";

/// A request for a script that has the network and the program, which is put into the daemon's store.
fn networked_request(daemon: &Daemon, script: &str) -> BuildRequest {
    let (client, addr) = (guest::client(), daemon.addr());
    let import = [OsStr::new("import"), OsStr::new("--daemon"), OsStr::new(&addr), client.as_os_str()];
    Cofferdam::new().command(import).succeeds();
    let contents = fs::read(client).expect("it was compiled");
    let (digest, size) = (blake3::hash(&contents).as_bytes().to_vec().into(), contents.len() as u64);
    let file = entry::Entry::File(FileEntry { name: b"client"[..].into(), digest, size, executable: true });
    let mut request = request::shell(script, &["build/out"]);
    request.inputs.push(Entry { entry: Some(file) });
    request.constraints.as_mut().expect("it has some").network_access = true;
    request
}

/// Has a daemon build a request over snix's protocol.
fn do_build(daemon: &Daemon, request: BuildRequest) -> Result<BuildResponse, Status> {
    let build = async {
        let mut client = SnixClient::new(daemon.peer().raw_channel());
        client.do_build(request::encoded(request)).await.map(Response::into_inner)
    };
    Runtime::new().expect("there are resources for a runtime").block_on(build)
}

/// A build that fails after denials: of a name, of another port of a name, of an address, and of a private one.
const DENIED: &str = "/inputs/client 'dns evil.example A' 'dns evil.example AAAA' 'dns good.example A' \
    'http 93.184.215.14:8080 good.example' 'http 93.184.215.15:443 nobody' 'http 10.0.0.5:80 nobody'; exit 7";

const UNLISTED: &str = "the build wanted evil.example, good.example:8080, 93.184.215.15/32:443, which no rule allows; ";

const PRIVATE: &str = "; it was denied 10.0.0.5:80 (the address is private)";

#[test]
fn a_build_that_failed_after_a_denial_says_which_flag_allows_it() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let outcome = networked(&cofferdam, &["good.example"]).shell(DENIED).build_fails("exit_code");
    let flags = "try --allow-host evil.example --allow-host good.example:8080 --allow-address 93.184.215.15/32:443";
    let hint = format!("{UNLISTED}{flags}{PRIVATE}");
    let outcome = outcome.says(&format!("\n  hint: {hint}\n"));
    let fields = &outcome.json()["fields"];
    assert_eq!(fields["hint"], hint);
    assert_eq!(fields["missing_rules"], json!(["evil.example", "good.example:8080", "93.184.215.15/32:443"]));
    // With these rules nothing but the private address is denied.
    let build = networked(&cofferdam, &["good.example", "evil.example", "good.example:8080 tls=false"]);
    let outcome = build.flag("--allow-address", "93.184.215.15/32:443").shell(DENIED).build_fails("exit_code");
    let outcome = outcome.says("\n  hint: the build was denied 10.0.0.5:80 (the address is private)\n");
    assert_eq!(outcome.json()["fields"]["missing_rules"], json!([]));
    // Nothing is denied, and nothing is hinted at.
    let outcome = networked(&cofferdam, &["good.example"]).shell("exit 7").build_fails("exit_code");
    assert!(!outcome.stderr.contains("hint:"), "{outcome}");
}

#[test]
fn clients_of_a_daemon_are_told_what_its_operator_can_allow() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let daemon = Daemon::start(&cofferdam, CONFIG);
    let client = Cofferdam::new();
    let hint = format!(
        "{UNLISTED}ask the daemon's operator to add \"evil.example\", \"good.example:8080\" to [network] allow and \
         \"93.184.215.15/32:443\" to [network] allow_addresses{PRIVATE}"
    );
    let build = client.build().on(&daemon).switch("--network").input("client", guest::client());
    let outcome = build.shell(DENIED).build_fails("exit_code").says(&format!("\n  hint: {hint}\n"));
    let outcome = outcome.says("network: evil.example denied (no rule)\n");
    assert_eq!(outcome.json()["fields"]["hint"], hint);
    let id = outcome.build_id().expect("a daemon names its builds");
    let show = |more: &[&str]| client.command([&["builds", "show", &id, "--daemon", &daemon.addr()], more].concat());
    let shown = show(&[]).succeeds();
    assert!(shown.stdout.contains(&format!("\nhint\t{hint}\n")), "{shown}");
    assert_eq!(show(&["--json"]).succeeds().json()["failure"]["fields"]["hint"], hint);

    // snix shows the status's message and nothing else.
    let status = do_build(&daemon, networked_request(&daemon, DENIED)).expect_err("its command fails");
    assert_eq!(status.code(), tonic::Code::Aborted);
    assert!(status.message().contains(&format!("status 7; hint: {hint}; the last lines of its log:")), "{status}");
    daemon.end().succeeds();
}

/// As snix asks for a derivation with a fixed output: it has the network, and nothing else is special.
#[test]
fn fetches_of_snix_are_built_by_rules_and_reused_only_if_configured() {
    let lab = Lab::new(LAB);
    let script = "/inputs/client 'dns good.example A' 'get 93.184.215.14:80 good.example /source' > out";
    let fetched = b"dns good.example A: code 0 93.184.215.14\n\
        get 93.184.215.14:80 good.example /source: this is good.example\n";
    for (config, connections) in [(CONFIG.to_owned(), 2), (format!("{CONFIG}reuse = true\n"), 3)] {
        let cofferdam = lab.cofferdam();
        let daemon = Daemon::start(&cofferdam, &config);
        for _ in 0..2 {
            let built = do_build(&daemon, networked_request(&daemon, script)).expect("a rule has all that it wants");
            let output = built.outputs.into_iter().next().and_then(|output| output.output);
            let node = output.unwrap_or_default().try_into_unnamed().expect("it is a node");
            let (digest, size) = (B3Digest::of(fetched), fetched.len() as u64);
            assert_eq!(node, Node::File { digest, size, executable: false });
        }
        assert_eq!(lab.connections(), vec!["93.184.215.14 80"; connections]);
        daemon.end().succeeds();
    }
    let cofferdam = lab.cofferdam();
    let daemon = Daemon::start(&cofferdam, "");
    let refused = do_build(&daemon, networked_request(&daemon, script)).expect_err("the daemon has no rules");
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("constraints.network_access must be false"), "{refused}");
    assert_eq!(lab.connections().len(), 3);
    daemon.end().succeeds();
}

#[test]
fn what_there_is_no_room_for_is_on_record() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let build = networked(&cofferdam, &["*.many.example"]);
    let names: String = (0..65).map(|number| format!(" 'dns n{number}.many.example A'")).collect();
    // One connection for queries too many. Then there is room again for a connection, though not for what it says.
    let outcome = build.shell(&format!("/inputs/client 'http-hold 192.0.0.1:53 nobody 65'{names}")).succeeds();
    let room = "http-hold 192.0.0.1:53 nobody 65: reset\n";
    let turned_away = "network: 192.0.0.1:53 denied (more connections at a time than the network device has room for; 0 more \
                       were refused)\n";
    let found = "\ndns n63.many.example A: code 0 93.184.215.14\n";
    let unknown = "\ndns n64.many.example A: code 0\n";
    let many = "network: n64.many.example denied (more names and addresses than builds may find: 93.184.215.14)\n";
    outcome.says(room).says(turned_away).says(found).says(unknown).says(many);
}

/// The next connections among a build's events, in the order of their names and verdicts.
async fn connections(events: &mut Streaming<ours::Event>, count: usize) -> Vec<ours::Connection> {
    let mut connections = Vec::new();
    while connections.len() < count {
        let event = events.message().await.expect("the stream goes on").expect("the build goes on");
        connections.extend(event.event.and_then(|event| match event {
            Event::Connection(connection) => Some(connection),
            _ => None,
        }));
    }
    connections.sort_by_key(|connection| (connection.name.clone(), connection.verdict.clone()));
    connections
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_told_while_a_build_runs_counted_and_traced() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let config = "[metrics]\nlisten = '127.0.0.1:0'\n[traces]\nendpoint = 'http://127.0.0.1:4317'\n";
    let daemon = block_in_place(|| Daemon::start(&cofferdam, &format!("{config}{CONFIG}")));
    let listener =
        in_network_of(daemon.running(), || TcpListener::bind("127.0.0.1:4317").expect("nobody else is there"));
    let mut collector = Collector::start(listener);
    let script = "/inputs/client 'dns evil.example A' 'dns good.example A' 'http 93.184.215.14:80 good.example' \
        'http 10.0.0.5:80 nobody'; sleep 1000";
    let request = request::encoded(block_in_place(|| networked_request(&daemon, script)));
    let request = ours::BuildRequest { request: Some(request), detached: true, ..Default::default() };
    let mut client = OurClient::new(daemon.peer().raw_channel());
    let mut events = client.build(request).await.unwrap().into_inner();
    let Some(Event::Accepted(ours::Accepted { id, .. })) = events.message().await.unwrap().unwrap().event else {
        panic!("it is not accepted first")
    };
    let told = connections(&mut events, 3).await;
    let (sent, received) = (told[2].sent, told[2].received);
    let connection = |name: &str, address: &str, verdict: &str, sent, received| ours::Connection {
        name: name.into(),
        address: address.into(),
        verdict: verdict.into(),
        sent,
        received,
    };
    let expected = [
        connection("", "10.0.0.5:80", "denied (the address is private)", 0, 0),
        connection("evil.example", "", "denied (no rule)", 0, 0),
        connection("good.example", "93.184.215.14:80", "allowed", sent, received),
    ];
    assert_eq!(told, expected);
    assert!(sent > 0 && received > 0);

    let addr = daemon.addrs(2).remove(1);
    let metrics = in_network_of(daemon.running(), || scrape(&addr).expect("the daemon serves its metrics"));
    for line in [
        "cofferdam_connections_total{verdict=\"allowed\"} 1".to_owned(),
        "cofferdam_connections_total{verdict=\"denied\"} 2".to_owned(),
        format!("cofferdam_connection_bytes_total{{direction=\"sent\"}} {sent}"),
        format!("cofferdam_connection_bytes_total{{direction=\"received\"}} {received}"),
    ] {
        assert!(metrics.lines().any(|found| found == line), "no {line} in {metrics}");
    }

    client.cancel(ours::CancelRequest { id: id.clone() }).await.unwrap();
    while let Some(event) = events.message().await.unwrap() {
        assert!(!matches!(event.event, Some(Event::Connection(_))), "it is told twice");
    }
    // Who watches after its end is told them, too.
    let mut events = client.watch(ours::WatchRequest { id, ..Default::default() }).await.unwrap().into_inner();
    assert_eq!(connections(&mut events, 3).await, expected);
    drop((client, events));
    block_in_place(|| daemon.end().succeeds());

    let spans = collector.spans();
    let span = spans.iter().find(|span| span.name == "build").expect("the build has a span");
    let attribute = |key: &str| {
        let found = span.attributes.iter().find(|attribute| attribute.key == format!("cofferdam.network.{key}"));
        found.and_then(|found| found.value.clone()?.value).unwrap_or_else(|| panic!("no {key} in {span:?}"))
    };
    let texts = |key| match attribute(key) {
        Value::ArrayValue(array) => array.values.into_iter().filter_map(|value| value.value).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let text = |text: &str| Value::StringValue(text.to_owned());
    assert_eq!(attribute("connections"), Value::IntValue(3));
    let bytes = [sent, received].map(|bytes| Value::IntValue(bytes.try_into().unwrap()));
    assert_eq!([attribute("sent"), attribute("received")], bytes);
    assert_eq!(texts("servers"), [text("good.example:80 at 93.184.215.14")]);
    assert_eq!(texts("denied"), [text("10.0.0.5:80"), text("evil.example")]);
}
