//! Builds on a host with an internet: they get the connections that a rule allows, and no server sees any other.

use std::{sync::Arc, time::Duration};

use cofferdam_tests::{
    Build, Cofferdam, Daemon, Lab, Outcome, RESOLVER, guest, network_devices, networked, processes::Process,
};
use nix::sys::signal::Signal;
use rustls::{ClientConfig, ClientConnection, RootCertStore, pki_types::ServerName};

const LAB: &str = env!("CARGO_BIN_EXE_network-lab");

/// `good.example` and `other.example`.
const GOOD: &str = "93.184.215.14";

/// What the program says of each step.
fn answers<const N: usize>(outcome: &Outcome, steps: [&str; N]) -> [String; N] {
    steps.map(|step| {
        let line = outcome.stderr.lines().find_map(|line| line.strip_prefix(&format!("{step}: ")));
        line.unwrap_or_else(|| panic!("nothing about {step:?}: {outcome}")).to_owned()
    })
}

/// Runs steps of the program, and compares what it says of each.
#[track_caller]
fn expect<const N: usize>(build: Build<'_>, steps: [(&str, &str); N]) -> Outcome {
    let program = "/inputs/client";
    let quoted: Vec<String> = steps.iter().map(|(step, _)| format!("'{step}'")).collect();
    let outcome = build.shell(&format!("{program} {}", quoted.join(" "))).succeeds();
    let (said, expected) = (answers(&outcome, steps.map(|(step, _)| step)), steps.map(|(_, answer)| answer));
    for ((said, expected), (step, _)) in said.iter().zip(expected).zip(steps) {
        assert_eq!(said, expected, "{step}: {outcome}");
    }
    outcome
}

/// The process of the only build's network device.
#[track_caller]
fn network_device(cofferdam: &Cofferdam) -> Process {
    network_devices(cofferdam).pop().unwrap_or_else(|| panic!("no network device among {:#?}", cofferdam.processes()))
}

/// What a TLS client says first.
fn hello(server: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.expect("its versions are known").with_root_certificates(RootCertStore::empty());
    let server = ServerName::try_from(server.to_owned()).expect("tests write names");
    let mut client = ClientConnection::new(Arc::new(config.with_no_client_auth()), server).expect("it is configured");
    let mut said = Vec::new();
    client.write_tls(&mut said).expect("a vector takes all");
    said
}

#[test]
fn a_build_connects_to_names_that_a_rule_has_and_to_no_others() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let outcome = expect(
        networked(&cofferdam, &["good.example"]),
        [
            ("dns good.example A", "code 0 93.184.215.14"),
            ("tcp-dns good.example AAAA", "code 0 2606:2800:21f::14"),
            ("dns good.example HTTPS", "code 0"),
            ("dns evil.example A", "code 3"),
            ("dns secret.good.example A", "code 3"),
            ("http 93.184.215.14:80 good.example", "this is good.example"),
            ("http [2606:2800:21f::14]:80 good.example", "this is good.example"),
            ("http-many 93.184.215.14:80 good.example 200", "200"),
            ("http 93.184.215.15:80 evil.example", "refused"),
            ("http 93.184.215.14:8080 good.example", "refused"),
            ("http 93.184.215.14:80 evil.example", "reset"),
            ("udp 8.8.8.8:53", "refused"),
            ("udp 192.0.0.1:443", "refused"),
            ("udp [2606:2800:21f::14]:443", "refused"),
            ("http 192.0.0.1:80 good.example", "refused"),
            ("count 93.184.215.14:80 good.example /8388608", "8388608"),
        ],
    );
    outcome.says("evil.example denied (no rule");
    let seen = lab.seen();
    // The one that named another server was connected before it did. It got nothing from the build, and the build nothing.
    assert_eq!(seen.iter().filter(|line| *line == "93.184.215.14 80").count(), 1 + 200 + 1 + 1, "{seen:?}");
    assert_eq!(seen.iter().filter(|line| *line == "2606:2800:21f::14 80").count(), 1, "{seen:?}");
    let expected = ["dns good.example 1", "dns good.example 28", "93.184.215.14 80", "2606:2800:21f::14 80"];
    assert!(seen.iter().all(|line| expected.contains(&line.as_str())), "{seen:?}");
}

#[test]
fn no_name_and_no_notation_lead_below_the_floor() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    expect(
        networked(&cofferdam, &["*", "*:8080 tls=false"]),
        [
            ("dns private.example A", "code 0"),
            ("dns metadata.example A", "code 0"),
            ("dns metadata.example AAAA", "code 0"),
            ("dns own.example A", "code 0"),
            ("dns own.example AAAA", "code 0"),
            // Without a way there, its IPv6 address is left out.
            ("dns dead.example AAAA", "code 0"),
            ("dns dead.example A", "code 0 93.184.215.14"),
            ("http 10.0.0.5:80 private.example", "refused"),
            ("http 10.0.0.53:80 private.example", "refused"),
            ("http 10.99.0.1:80 private.example", "refused"),
            ("http 10.99.0.2:80 private.example", "refused"),
            ("http 100.64.0.1:8080 a.example", "refused"),
            ("http 169.254.169.254:80 metadata.example", "refused"),
            ("http 172.16.0.1:8080 a.example", "refused"),
            ("http 192.168.0.1:8080 a.example", "refused"),
            ("http 198.51.100.1:8080 a.example", "refused"),
            ("http 168.63.129.16:80 a.example", "refused"),
            ("http 45.33.32.1:8080 own.example", "refused"),
            ("http 45.33.33.2:8080 own.example", "refused"),
            ("http [2606:2801::7]:8080 own.example", "refused"),
            ("http [64:ff9b::a9fe:a9fe]:80 metadata.example", "refused"),
            ("http [64:ff9b::a9fe:a9fe]:8080 metadata.example", "refused"),
            ("http [2002:a9fe:a9fe::1]:8080 a.example", "refused"),
            ("http [fd99::2]:8080 a.example", "refused"),
            ("http 93.184.215.15:8080 evil.example", "refused"),
            ("dns turns.example A", "code 0 93.184.215.15"),
            ("http 93.184.215.15:8080 turns.example", "this is turns.example"),
            // Its second address is private.
            ("tcp-dns turns.example A", "code 0"),
        ],
    );
    assert_eq!(lab.connections(), ["93.184.215.15 8080"]);
}

#[test]
fn the_server_that_a_build_asks_for_must_be_the_one_that_it_has_found() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let mut build = networked(&cofferdam, &["good.example", "git.example:22 tls=false"]);
    for server in ["good.example", "other.example", "93.184.215.14"] {
        let said = hello(server);
        assert!(said.len() < 64 * 1024);
        build = build.input(&format!("hello-{server}"), &cofferdam.file(server, said));
    }
    build = build.input("ssh", &cofferdam.file("ssh", "SSH-2.0-client\r\n"));
    let length = hello("good.example").len();
    expect(
        build,
        [
            ("dns good.example A", "code 0 93.184.215.14"),
            ("send-file 93.184.215.14:443 /inputs/hello-good.example", &format!("got {length} bytes")),
            ("send-file 93.184.215.14:443 /inputs/hello-other.example", "reset"),
            ("send-file 93.184.215.14:443 /inputs/hello-93.184.215.14", "reset"),
            ("send-file 93.184.215.14:443 /inputs/ssh", "reset"),
            ("http 93.184.215.14:80 other.example", "reset"),
        ],
    );
    assert!(lab.connections().iter().all(|line| line.starts_with(GOOD)), "{:?}", lab.connections());
}

#[test]
fn ends_resets_and_refusals_reach_the_build_as_such() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let build = networked(&cofferdam, &[]);
    let ports = [7, 9, 10, 11, 13, 22, 80, 81];
    let build = ports.iter().fold(build, |build, port| build.flag("--allow-address", format!("{GOOD}/32:{port}")));
    let build = build.flag("--allow-address", "[2606:2800:21f::]/48:7");
    let build = build.flag("--allow-address", "[2001:4860::]/32:7").flag("--allow-address", "10.0.0.5/32:80");
    let build = build.flag("--allow-address", "93.184.215.99/32:7");
    expect(
        build,
        [
            ("listen 93.184.215.14:22", "SSH-2.0-lab"),
            ("upload 93.184.215.14:7 5000000", "got 5000000 bytes"),
            ("upload [2606:2800:21f::14]:7 1000000", "got 1000000 bytes"),
            ("http 93.184.215.14:9 nobody", "reset"),
            ("count 93.184.215.14:10 nobody /", "reset"),
            ("speak-last 93.184.215.14:11 1000000", "over"),
            ("listen 93.184.215.14:13", "heard 1000000 bytes"),
            ("http 93.184.215.14:81 nobody", "refused"),
            // Through the floor, since a rule says so.
            ("http 10.0.0.5:80 nobody", "this is nobody"),
            // The internet's router has no route to it.
            ("listen [2001:4860::1]:7", "unreachable"),
            // Nobody answers there, and nobody says so.
            ("listen 93.184.215.99:7", "unreachable"),
        ],
    );
}

#[test]
fn a_name_whose_ipv6_address_is_dead_is_reached_by_the_other() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    expect(
        networked(&cofferdam, &["half.example"]),
        [
            ("http-by-each half.example 80", "unreachable, then this is half.example"),
            ("http-by-name half.example 80", "this is half.example"),
        ],
    );
}

#[test]
fn an_address_that_another_build_has_resolved_is_no_way_to_it() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let config = format!(
        "[budget]\nbuilds = 2\ncpus = 2\n[build]\ncpus = 1\n[network]\nallow = [\"good.example\"]\nresolvers = [\"{RESOLVER}\"]\n"
    );
    let daemon = Daemon::start(&cofferdam, &config);
    let client = Cofferdam::new();
    let build = || client.build().on(&daemon).switch("--network").input("client", guest::client());
    let (resolve, ask) = ("dns good.example A", "http 93.184.215.14:80 good.example");
    // The first is still there when the second asks.
    let first = build().start_shell(&format!("/inputs/client '{resolve}' '{ask}'; sleep 1000"));
    first.wait_for(&format!("{ask}: this is good.example"));
    expect(build(), [(ask, "refused"), (resolve, "code 0 93.184.215.14")]);
    assert_eq!(lab.connections(), ["93.184.215.14 80"]);
    first.signal(Signal::SIGINT);
    first.end();
    daemon.end().succeeds();
}

#[test]
fn a_build_has_so_many_connections_and_they_are_given_back() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let build = networked(&cofferdam, &[]).flag("--allow-address", format!("{GOOD}/32:80"));
    let outcome = expect(build, [("http-hold 93.184.215.14:80 nobody 140", "128, then this is nobody")]);
    outcome.says("more connections at a time than [network] connections allows");
}

#[test]
fn a_daemon_lets_builds_use_the_network_as_it_is_configured_and_keeps_a_record() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let daemon =
        Daemon::start(&cofferdam, &format!("[network]\nallow = [\"good.example\"]\nresolvers = [\"{RESOLVER}\"]\n"));
    // Clients need no network.
    let client = Cofferdam::new();
    let build = || {
        let build = client.build().on(&daemon).switch("--network").input("client", guest::client());
        let steps = [
            ("dns good.example A", "code 0 93.184.215.14"),
            ("dns evil.example A", "code 3"),
            ("http 93.184.215.14:80 good.example", "this is good.example"),
            ("http 10.0.0.5:80 private.example", "refused"),
        ];
        expect(build, steps).build_id().expect("a daemon names its builds")
    };
    let (first, second) = (build(), build());
    assert_ne!(first, second, "a build with a network is no answer to another");
    let shown = client.command(["builds", "show", &first, "--json", "--daemon", &daemon.addr()]).succeeds().json();
    let connections = shown["connections"].as_array().expect("it had some");
    let verdict = |name: &str, address: &str| {
        let is_it = |one: &&serde_json::Value| one["name"] == name && one["address"] == address;
        let found = connections.iter().find(is_it).unwrap_or_else(|| panic!("no {name} {address}: {shown}"));
        (found["verdict"].as_str().unwrap_or_default().to_owned(), found["received"].as_u64())
    };
    let (allowed, received) = verdict("good.example", "93.184.215.14:80");
    assert_eq!(allowed, "allowed");
    // The end of a stream counts as a byte.
    let length = "HTTP/1.0 200 OK\r\n\r\nthis is good.example\n".len() as u64 + 1;
    assert_eq!(received, Some(length));
    assert!(verdict("evil.example", "").0.starts_with("denied (no rule"));
    assert!(verdict("", "10.0.0.5:80").0.starts_with("denied (the address is private"));
    assert_eq!(lab.connections(), ["93.184.215.14 80"; 2]);
    daemon.end().succeeds();
}

#[test]
fn a_clients_table_narrows_what_its_builds_get() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    // The daemon is root of its user namespace, so it sees the client as such.
    let daemon = Daemon::start(
        &cofferdam,
        &format!(
            "[network]\nallow = [\"good.example\", \"evil.example\"]\nresolvers = [\"{RESOLVER}\"]\n\
             allow_addresses = [\"10.0.0.5/32:80\"]\n\
             [network.clients.\"user:0\"]\nallow = [\"good.example:80\"]\nclient_connections = 3\n\
             [network.clients.\"user:1\"]\nallow = []\n"
        ),
    );
    let client = Cofferdam::new();
    let outcome = expect(
        client.build().on(&daemon).switch("--network").input("client", guest::client()),
        [
            ("dns good.example A", "code 0 93.184.215.14"),
            ("http 93.184.215.14:80 good.example", "this is good.example"),
            ("listen 93.184.215.14:443", "refused"),
            ("dns evil.example A", "code 3"),
            ("http 10.0.0.5:80 private.example", "refused"),
            ("http-hold 93.184.215.14:80 good.example 5", "3, then this is good.example"),
        ],
    );
    let id = outcome.build_id().expect("a daemon names its builds");
    let shown = client.command(["builds", "show", &id, "--daemon", &daemon.addr()]).succeeds();
    assert!(shown.stdout.contains("evil.example denied (no rule"), "{shown}");
    assert!(shown.stdout.contains("more connections of this client at a time"), "{shown}");
    assert!(lab.connections().iter().all(|line| line == "93.184.215.14 80"), "{:?}", lab.connections());
    daemon.end().succeeds();
}

#[test]
fn a_request_narrows_what_its_client_gets_and_never_widens_it() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let daemon = Daemon::start(
        &cofferdam,
        &format!("[network]\nallow = [\"good.example\", \"evil.example\"]\nresolvers = [\"{RESOLVER}\"]\n"),
    );
    let client = Cofferdam::new();
    let build = || client.build().on(&daemon).switch("--network").input("client", guest::client());
    for (flag, rule) in [("--allow-host", "other.example"), ("--allow-address", "10.0.0.5/32:80")] {
        let refused = build().flag(flag, rule).run(["/inputs/client"]);
        let field = if flag == "--allow-host" { "network.allow[0]" } else { "network.allow_addresses[0]" };
        let refused = refused.exits_with(2).says(&format!("{field} must not allow more")).says(rule);
        assert_eq!(refused.build_id(), None, "{refused}");
    }
    let without = client.build().on(&daemon).flag("--allow-host", "good.example").run(["/bin/true"]);
    without.exits_with(2).says("network must be absent where constraints.network_access is false");
    assert_eq!(lab.seen(), [""; 0], "nothing has booted");
    expect(
        build().flag("--allow-host", "good.example:80"),
        [
            ("dns good.example A", "code 0 93.184.215.14"),
            ("http 93.184.215.14:80 good.example", "this is good.example"),
            ("listen 93.184.215.14:443", "refused"),
            ("dns evil.example A", "code 3"),
        ],
    );
    daemon.end().succeeds();
}

#[test]
fn settings_deny_addresses_and_ipv6_and_audits_record_which_server_is_asked_for() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let daemon = Daemon::start(
        &cofferdam,
        &format!(
            "[network]\nmode = \"audit\"\nresolvers = [\"{RESOLVER}\"]\nipv6 = false\n\
             deny_addresses = [\"93.184.215.15/32\"]\n"
        ),
    );
    let client = Cofferdam::new();
    let outcome = expect(
        client.build().on(&daemon).switch("--network").input("client", guest::client()),
        [
            ("dns good.example A", "code 0 93.184.215.14"),
            ("dns good.example AAAA", "code 0"),
            ("http [2606:2800:21f::14]:80 good.example", "refused"),
            ("dns evil.example A", "code 0"),
            ("http 93.184.215.15:80 evil.example", "refused"),
            ("http 93.184.215.14:80 other.example", "this is other.example"),
            ("http 93.184.215.14:443 other.example", "got 39 bytes"),
            ("listen 93.184.215.14:22", "SSH-2.0-lab"),
        ],
    );
    let id = outcome.build_id().expect("a daemon names its builds");
    let shown = client.command(["builds", "show", &id, "--daemon", &daemon.addr()]).succeeds();
    for line in [
        "good.example denied ([network] ipv6 is false: 2606:2800:21f::14)",
        "evil.example denied ([network] deny_addresses has the address: 93.184.215.15)",
        "other.example 93.184.215.14:80 allowed",
        "good.example 93.184.215.14:443 allowed",
        "good.example 93.184.215.14:22 allowed",
    ] {
        assert!(shown.stdout.contains(line), "{line}: {shown}");
    }
    daemon.end().succeeds();
}

/// A build on a daemon with this proxy. Returns its connections on record.
fn behind_proxy<const N: usize>(lab: &Lab, proxy: &str, steps: [(&str, &str); N]) -> String {
    let cofferdam = lab.cofferdam();
    let daemon = Daemon::start(
        &cofferdam,
        &format!(
            "[network]\nupstream_proxy = \"{proxy}\"\nallow_addresses = [\"93.184.215.14/32:7\"]\n\
             allow = [\"*.example\", \"private.example:8080 tls=false\", \"good.example:22 tls=false\"]\n"
        ),
    );
    let client = Cofferdam::new();
    let outcome = expect(client.build().on(&daemon).switch("--network").input("client", guest::client()), steps);
    let id = outcome.build_id().expect("a daemon names its builds");
    let shown = client.command(["builds", "show", &id, "--daemon", &daemon.addr()]).succeeds();
    let said = daemon.end().succeeds();
    assert!(!format!("{outcome}{shown}{said}").contains("secret"), "{outcome}{shown}{said}");
    shown.stdout
}

#[test]
fn a_proxy_makes_all_connections_and_is_asked_by_name() {
    let lab = Lab::new(LAB);
    let shown = behind_proxy(
        &lab,
        "http://user:secret@10.0.0.5:3128",
        [
            ("dns good.example A", "code 0 198.18.0.1"),
            ("dns good.example AAAA", "code 0"),
            ("http 198.18.0.1:80 good.example", "this is good.example"),
            ("http 198.18.0.1:80 evil.example", "reset"),
            // The server speaks first, behind the proxy's answer.
            ("listen 198.18.0.1:22", "SSH-2.0-lab"),
            ("listen 198.18.0.1:8080", "refused"),
            ("dns unlisted.test A", "code 3"),
            ("http 198.18.0.2:80 good.example", "refused"),
            ("upload 93.184.215.14:7 1000", "got 1000 bytes"),
            ("http 93.184.215.14:80 good.example", "refused"),
            // The proxy itself is below the floor.
            ("listen 10.0.0.5:3128", "refused"),
            ("dns evil.example A", "code 0 198.18.0.2"),
            ("listen 198.18.0.2:80", "refused"),
            ("dns turns.example A", "code 0 198.18.0.3"),
            ("listen 198.18.0.3:80", "refused"),
            ("dns nowhere.example A", "code 0 198.18.0.4"),
            ("listen 198.18.0.4:443", "refused"),
            // Where names lead to is for the proxy to decide.
            ("dns private.example A", "code 0 198.18.0.5"),
            ("http 198.18.0.5:8080 private.example", "this is private.example"),
        ],
    );
    for line in [
        "good.example 198.18.0.1:80 allowed",
        "evil.example 198.18.0.2:80 failed (the upstream proxy answered with status 403)",
        "turns.example 198.18.0.3:80 failed (the upstream proxy didn't answer in HTTP",
        "nowhere.example 198.18.0.4:443 failed (the upstream proxy answered with status 502)",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    let seen = lab.seen();
    assert!(seen.contains(&"proxy good.example:80".to_owned()), "{seen:?}");
    assert!(seen.contains(&"proxy 93.184.215.14:7".to_owned()), "{seen:?}");
    let (asked, connected): (Vec<_>, Vec<_>) = seen.iter().partition(|line| line.starts_with("proxy "));
    let expected = ["93.184.215.14 80", "93.184.215.14 80", "93.184.215.14 22", "93.184.215.14 7", "10.0.0.5 8080"];
    assert_eq!(connected, expected.iter().collect::<Vec<_>>(), "nothing but the proxy connects: {asked:?}");
}

#[test]
fn a_proxy_that_knows_no_credentials_is_an_error_of_its_own() {
    let lab = Lab::new(LAB);
    let steps = [("dns good.example A", "code 0 198.18.0.1"), ("listen 198.18.0.1:80", "refused")];
    let shown = behind_proxy(&lab, "http://user:secrets@10.0.0.5:3128", steps);
    assert!(
        shown.contains("good.example 198.18.0.1:80 failed (the upstream proxy answered with status 407)"),
        "{shown}"
    );
    assert_eq!(lab.connections(), [""; 0]);
}

#[test]
fn resolvers_that_dont_answer_are_named() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let build =
        cofferdam.build().switch("--network").flag("--resolver", "10.0.0.5:53").input("client", guest::client());
    let outcome = expect(build.flag("--allow-host", "good.example"), [("dns good.example A", "code 2")]);
    outcome.says("good.example failed (no DNS server gave a usable answer; see [network] resolvers)");
}

#[test]
fn builds_with_a_network_find_the_operators_certificates() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let certificates = rcgen::generate_simple_self_signed(["ca.example".to_owned()]).unwrap().cert.pem();
    let ca_file = cofferdam.file("ca.pem", &certificates);
    cofferdam.file("etc/ssl/certs/ca-certificates.crt", "the root's own\n");
    let printed = |build: Build<'_>| build.shell("cat /etc/ssl/certs/ca-certificates.crt").succeeds().stderr;
    let own = cofferdam.files().join("etc");
    let build = || networked(&cofferdam, &["good.example"]).flag("--inputs-dir", "").input("etc", &own);
    assert!(printed(build().flag("--ca-file", &ca_file)).ends_with(&certificates));
    assert!(printed(build()).ends_with("the root's own\n"));
    // A request's own file comes first, and a request's file in the way is no error.
    for (path, printed) in [("etc/ssl/certs/ca-certificates.crt", "the request's own"), ("etc/ssl", "")] {
        let request = serde_json::json!({
            "commandArgs": ["/bin/sh", "-c", "cat /etc/ssl/certs/ca-certificates.crt || true"],
            "constraints": { "system": "x86_64-linux", "provideBinSh": true, "networkAccess": true },
            "additionalFiles": [{ "path": path, "contents": data_encoding::BASE64.encode(b"the request's own") }],
        });
        let build = cofferdam.build().flag("--allow-host", "good.example").flag("--resolver", RESOLVER);
        let outcome = build.flag("--ca-file", &ca_file).request(&request).succeeds();
        assert!(outcome.stderr.contains(printed) && !outcome.stderr.contains("BEGIN CERTIFICATE"), "{outcome}");
    }
    let refused = networked(&cofferdam, &["good.example"]).flag("--ca-file", own.join("ssl/certs/ca-certificates.crt"));
    refused.shell("true").is_refused("command_line").says("holds no certificate in PEM");
}

#[test]
fn a_killed_network_device_ends_its_build_and_is_named() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let build = networked(&cofferdam, &["good.example"]);
    let running = build.start_shell("/inputs/client 'dns good.example A'; sleep 1000");
    running.wait_for("code 0");
    network_device(&cofferdam).kill();
    running.end().executor_fails("process_died").says("network device died").says("SIGKILL");
}

#[test]
fn a_killed_hosts_network_device_dies_with_it() {
    let lab = Lab::new(LAB);
    let cofferdam = lab.cofferdam();
    let build = networked(&cofferdam, &[]).flag("--allow-address", format!("{GOOD}/32:7"));
    let running = build.start_shell("/inputs/client 'upload 93.184.215.14:7 1000'; sleep 1000");
    running.wait_for("got 1000 bytes");
    network_device(&cofferdam);
    running.signal(Signal::SIGKILL);
    running.end();
    cofferdam.processes_are_gone_within(Duration::from_secs(5));
    // The next start removes its files.
    cofferdam.build().shell("true").succeeds();
}

#[test]
fn a_network_without_a_rule_is_refused_before_anything_boots() {
    let cofferdam = Cofferdam::new();
    let refused = cofferdam.build().without_slot().switch("--network").run(["/bin/true"]);
    refused.exits_with(2).says("--allow-host NAME");
    let build = cofferdam.build().without_slot().switch("--network").flag("--allow-host", "https://a.example");
    build.run(["/bin/true"]).exits_with(2).says("must be NAME, *.NAME or *");
}
