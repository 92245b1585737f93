//! The daemon's life: configuration, systemd, signals, access of clients, metrics and traces.

use std::{
    ffi::OsStr,
    fs,
    net::TcpListener,
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            fs::PermissionsExt as _,
            net::{UnixDatagram, UnixListener},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use cofferdam_castore::{
    B3Digest, Node,
    proto::{Entry, EntryExt as _},
};
use cofferdam_proto::cofferdam::v1::{self as ours, build_service_client::BuildServiceClient};
use cofferdam_tests::{
    Authority, Cofferdam, Daemon, Outcome, Running, program,
    request::encoded,
    stretched,
    telemetry::{Collector, scrape},
};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::signal::Signal,
};
use tonic::Request;

/// The arguments that check a configuration on any host that can run the tests.
fn check_config(file: &Path) -> [&OsStr; 5] {
    let [daemon, emulation, check, config] =
        ["daemon", "--allow-emulation", "--check-config", "--config"].map(OsStr::new);
    [daemon, emulation, check, config, file.as_os_str()]
}

#[test]
fn configuration_errors_name_file_line_and_value() {
    let cofferdam = Cofferdam::new();
    let check = |text: &str| {
        let file = cofferdam.file("daemon.toml", text);
        cofferdam.command(check_config(&file))
    };
    check("drain_timeout = '1m'\n[build]\nmemory = '512M'").succeeds();
    for (text, words) in [
        ("colour = 'red'", "daemon.toml:1: colour = 'red': unknown field `colour`"),
        ("[build]\ntimeout = 'soon'", "daemon.toml:2: build.timeout = 'soon'"),
        ("[build]\nmemory = '1000T'", "daemon.toml:2: build.memory = '1000T': must be from"),
        ("[budget]\nmemory = '1000T'", "daemon.toml:2: budget.memory = '1000T': must be from"),
        ("image = '/nowhere'", "daemon.toml:1: image = '/nowhere': the guest image lacks /nowhere/"),
        ("[tls]\ncertificate = '/nowhere'\nkey = '/none'", "daemon.toml:2: tls.certificate = '/nowhere': can't read"),
        ("[tls]\ncertificate = '/nowhere'\nkey = '/none'", "daemon.toml:3: tls.key = '/none': can't read"),
        ("[tls]\ncertificate = '/dev/null'\nkey = '/dev/null'", "tls.certificate = '/dev/null': can't be used for TLS"),
        ("listen = [", "daemon.toml:1: unclosed array"),
        ("listen = ['here']", "daemon.toml:1: listen = 'here': \"here\" is not an address"),
        ("[traces]\nendpoint = 'here'", "write http://HOST:PORT"),
        ("vmm = 'cloud-hypervisor'\ncpu_model = 'Nehalem-v1'", "daemon.toml:2: cpu_model = 'Nehalem-v1'"),
        ("[build]\nmemory = '1T'\n[budget]\nmemory = '1T'", "daemon.toml:4: budget.memory = '1T'"),
        ("hugepages = true\n[build]\nmemory = '1T'", "daemon.toml:1: hugepages = true: a machine's 1.06 TiB take"),
        ("[host_paths]\n'/data' = '/nowhere'", "daemon.toml:2: host_paths.\"/data\" = '/nowhere': can't be read"),
        ("[store]\nblob_service_addr = '/var/store'", "daemon.toml:2: store.blob_service_addr = '/var/store': "),
        ("[store]\nblob_service_addr = '/var/store'", "no scheme"),
        ("[store]\nblob_service_addr = 'redb:///store'", "the scheme \"redb\""),
        (
            "[store]\nblob_service_addr = 'cache:///cache?remote=objectstore+file:///p?region=x'",
            "the option \"region\"",
        ),
        ("[store]\ndirectory_service_addr = 'file:///store'", "the scheme \"file\""),
        ("[store]\ndirectory_service_addr = 'grpc+http://host:port'", "the host and port"),
    ] {
        check(text).exits_with(2).says(words);
    }
    if cofferdam::machine::vmm::survey().qemu.accelerator.is_some() {
        check("cpu_model = 'Nothing-v1'").exits_with(2).says("cpu_model = 'Nothing-v1': this QEMU has no CPU model");
        check("cpu_model = 'Nehalem-v1'").succeeds();
    }
    let authority = Authority::new();
    let [certificate, key] = sign(&authority, &cofferdam, "host");
    let tls = format!("[tls]\ncertificate = {certificate:?}\nkey = {key:?}");
    check(&tls).succeeds();
    // A server's certificate doesn't identify clients.
    check(&format!("listen = ['[::]:8000']\n{tls}")).exits_with(2).says("allow_anonymous_tcp = true");
    let ca = cofferdam.file("ca.pem", authority.pem());
    check(&format!("listen = ['[::]:8000']\n{tls}\nclient_ca = {ca:?}")).succeeds();
    check(&format!("listen = ['[::]:8000']\nallow_anonymous_tcp = true\n{tls}")).succeeds();
    check(&format!("{tls}\nclient_ca = {key:?}")).exits_with(2).says("host.key");
    let [_, other] = sign(&authority, &cofferdam, "other");
    check(&format!("[tls]\ncertificate = {certificate:?}\nkey = {other:?}")).exits_with(2).says("other.key");
    // An empty variable counts as unset, so the file's value applies.
    let file = cofferdam.file("daemon.toml", "[store]\nblob_service_addr = '/var/store'");
    let variables = |value| [("BLOB_SERVICE_ADDR", Path::new(value))];
    cofferdam.command_with(&variables(""), check_config(&file)).exits_with(2).says("daemon.toml:2").says("no scheme");
    cofferdam.command_with(&variables("memory://"), check_config(&file)).succeeds();
    let nowhere = cofferdam.command(check_config(Path::new("nowhere.toml")));
    nowhere.exits_with(2).says("nowhere.toml");
    // Only the checks ran.
    assert!(!cofferdam.run_directory().exists());
}

#[test]
fn all_configuration_errors_are_reported_at_once() {
    let cofferdam = Cofferdam::new();
    let text = "colour = 'red'\nvmm = 'cloud-hypervisor'\nimage = '/nowhere'\n[budget]\ncpus = 0\nmemory = '1M'\n";
    let file = cofferdam.file("daemon.toml", text);
    let variable = [("COFFERDAM_CLOUD_HYPERVISOR", Path::new("/nowhere"))];
    let told = cofferdam.command_with(&variable, check_config(&file)).exits_with(2);
    let lines = ["1: colour", "2: vmm = 'cloud-hypervisor'", "3: image", "5: budget.cpus", "6: budget.memory"];
    let says_all =
        |outcome| lines.iter().fold(outcome, |told: Outcome, line| told.says(&format!("daemon.toml:{line}")));
    says_all(told);
    // The daemon itself makes the same checks.
    let arguments = [OsStr::new("daemon"), "--config".as_ref(), file.as_os_str()];
    says_all(cofferdam.command_with(&variable, arguments).exits_with(2));
    // A lack of the host is not a fault of the configuration.
    let cofferdam = Cofferdam::with_image("/nowhere/image");
    let told = cofferdam.command(check_config(&cofferdam.file("daemon.toml", ""))).exits_with(3);
    told.says("image: the guest image lacks /nowhere/image/");
}

#[test]
fn the_documented_configuration_is_valid() {
    let cofferdam = Cofferdam::new();
    let authority = Authority::new();
    sign(&authority, &cofferdam, "host");
    sign(&authority, &cofferdam, "clients");
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/daemon.md")).unwrap();
    let (_, example) = document.split_once("```toml\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    // The documented file names are replaced by existing ones.
    let (files, image) = (cofferdam.files(), cofferdam_tests::image().0);
    let example = [
        ("/etc/cofferdam/", format!("{}/", files.display())),
        ("\"/usr/lib/cofferdam/image\"", format!("{image:?}")),
        ("= \"/usr/share/zoneinfo\"", format!("= {files:?}")),
    ]
    .into_iter()
    .fold(example.to_owned(), |example, (named, here)| {
        assert!(example.contains(named), "{named}");
        example.replace(named, &here)
    });
    cofferdam.command(check_config(&cofferdam.file("daemon.toml", example))).succeeds();
}

#[test]
fn the_packaged_configuration_is_valid() {
    let cofferdam = Cofferdam::new();
    let packaged = Path::new(env!("CARGO_MANIFEST_DIR")).join("../host/daemon.toml");
    let with_emulation = fs::read_to_string(packaged).unwrap().replace("# allow_emulation", "allow_emulation");
    let image = format!("image = {:?}\n", cofferdam_tests::image().0);
    cofferdam.command(check_config(&cofferdam.file("daemon.toml", image + &with_emulation))).succeeds();
}

#[test]
fn emulation_must_be_allowed_and_the_socket_is_private() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "");
    let mode = fs::metadata(cofferdam.files().join("daemon.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    daemon.end().succeeds();
    if cofferdam_tests::vmm::choice().accelerator == cofferdam::machine::vmm::Accelerator::Tcg {
        cofferdam.command(["daemon"]).exits_with(3).says("emulated").says("--allow-emulation");
    }
}

#[test]
fn unauthenticated_tcp_must_be_allowed() {
    let cofferdam = Cofferdam::new();
    let open = ["daemon", "--allow-emulation", "--listen", "0.0.0.0:0"];
    cofferdam.command(open).exits_with(2).says("listen: anyone who reaches").says("--allow-anonymous-tcp");
    // A socket from systemd that is not in the configuration.
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let addr = listener.local_addr().unwrap();
    activated(&cofferdam, &listener, &[], &[]).end().exits_with(2).says(&format!("anyone who reaches {addr}"));
    let allowed = cofferdam.start_command(open.into_iter().chain(["--allow-anonymous-tcp"]));
    assert!(allowed.stdout_lines(1)[0].starts_with("grpc+http://0.0.0.0:"));
    allowed.signal(Signal::SIGTERM);
    allowed.end().succeeds();
}

/// Starts a daemon as systemd does: with a socket as descriptor 3, and with its process id in a variable.
fn activated(
    cofferdam: &Cofferdam,
    listener: &(impl AsFd + AsRawFd),
    arguments: &[&OsStr],
    variables: &[(&str, &OsStr)],
) -> Running {
    fcntl(listener, FcntlArg::F_SETFD(FdFlag::empty())).expect("it is open");
    let script = format!("exec 3<&{}; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", listener.as_raw_fd());
    let daemon = ["-c".as_ref(), script.as_ref(), "sh".as_ref(), program().as_os_str(), "daemon".as_ref()];
    let arguments = daemon.into_iter().chain(["--allow-emulation".as_ref()]).chain(arguments.iter().copied());
    cofferdam.start_program(Path::new("bash"), arguments, variables)
}

#[test]
fn systemds_socket_may_be_in_the_configuration_beside_others() {
    let cofferdam = Cofferdam::new();
    let [theirs, ours] = ["activated", "ours"].map(|name| cofferdam.files().join(name));
    let listener = UnixListener::bind(&theirs).unwrap();
    let file = cofferdam.file("daemon.toml", format!("listen = [{ours:?}, {theirs:?}]"));
    let daemon = activated(&cofferdam, &listener, &["--config".as_ref(), file.as_os_str()], &[]);
    let addrs = [&theirs, &ours].map(|path| format!("grpc+unix://{}", path.display()));
    assert_eq!(daemon.stdout_lines(2), addrs);
    for addr in &addrs {
        cofferdam.command(["builds", "--daemon", addr, "list"]).succeeds();
    }
    daemon.signal(Signal::SIGTERM);
    daemon.end().succeeds();
    assert!(theirs.exists() && !ours.exists(), "the daemon removes its own socket alone");
}

#[test]
fn systemd_passes_the_socket_and_gets_notifications() {
    let cofferdam = Cofferdam::new();
    let told = UnixDatagram::bind(cofferdam.files().join("notify")).unwrap();
    told.set_read_timeout(Some(stretched(Duration::from_secs(60)))).unwrap();
    let path = cofferdam.files().join("activated");
    let listener = UnixListener::bind(&path).unwrap();
    let notify = cofferdam.files().join("notify");
    let variables = [("NOTIFY_SOCKET", notify.as_os_str()), ("WATCHDOG_USEC", OsStr::new("4000000"))];
    let daemon = activated(&cofferdam, &listener, &[], &variables);
    let next = || {
        let mut buffer = [0; 4096];
        let length = told.recv(&mut buffer).expect("systemd is told in time");
        String::from_utf8_lossy(&buffer[..length]).trim().to_owned()
    };
    assert_eq!(next(), "READY=1");
    assert_eq!([next(), next()], ["WATCHDOG=1", "WATCHDOG=1"]);
    assert_eq!(daemon.stdout_lines(1), [format!("grpc+unix://{}", path.display())]);
    let addr = format!("grpc+unix://{}", path.display());
    cofferdam.command(["builds", "--daemon", &addr, "list"]).succeeds();
    daemon.signal(Signal::SIGTERM);
    while next() != "STOPPING=1" {}
    daemon.end().succeeds();
    assert!(path.exists(), "the socket is systemd's to remove");
}

#[test]
fn builds_end_with_the_drain_timeout_or_a_killed_daemon() {
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, "drain_timeout = '1s'");
    let build = |daemon: &Daemon| {
        let build = cofferdam.build().on(daemon);
        let running = build.start_shell("echo begun; sleep 1000");
        running.wait_for("begun");
        running
    };
    let cancelled = build(&daemon);
    daemon.end().succeeds();
    cancelled.end().executor_fails("interrupted");

    let daemon = Daemon::start(&cofferdam, "");
    let lost = build(&daemon);
    daemon.running().signal(Signal::SIGKILL);
    daemon.end_of();
    let left = lost.end().executor_fails("daemon").says("went away").says("log -f");
    let id = left.build_id().expect("it was told at once");
    assert_eq!(
        (&left.json()["fields"]["cause"], &left.json()["fields"]["build_id"]),
        (&"went_away".into(), &id.clone().into())
    );
    let daemon = Daemon::start(&cofferdam, "");
    // The advised commands work, also with a shortened id.
    let builds = |arguments: &[&str]| cofferdam.command(["builds", "--daemon", &daemon.addr()].iter().chain(arguments));
    assert_eq!(builds(&["log", "-f", &id[..30]]).succeeds().stdout, "begun\n");
    assert_eq!(builds(&["show", "--json", &id]).succeeds().json()["state"], "lost");
    let listed = builds(&["list"]).succeeds().stdout;
    assert!(listed.contains(&format!("{id}\tlost\t")), "{listed}");
    builds(&["show", "01"]).exits_with(2).says("2 builds have ids that begin with \"01\"");
    let list = cofferdam.command(["builds", "--daemon", &daemon.addr(), "list", "--json"]).succeeds();
    let reasons: Vec<_> = list
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["failure"]["reason"].clone())
        .collect();
    assert_eq!(reasons, ["lost", "interrupted"]);
    daemon.end().succeeds();
}

/// The files of a certificate and its key, for this host and a client of this name; an empty name is left out.
fn sign(authority: &Authority, cofferdam: &Cofferdam, name: &str) -> [PathBuf; 2] {
    let client = (!name.is_empty()).then(|| format!("dns:{name}.example"));
    let [certificate, key] = authority.sign(client.as_deref());
    [cofferdam.file(&format!("{name}.pem"), certificate), cofferdam.file(&format!("{name}.key"), key)]
}

#[test]
fn mutual_tls_refuses_strangers_and_separates_clients() {
    let cofferdam = Cofferdam::new();
    let authority = Authority::new();
    let ca = cofferdam.file("ca.pem", authority.pem());
    let [certificate, key] = sign(&authority, &cofferdam, "host");
    let config =
        format!("listen = ['127.0.0.1:0']\n[tls]\ncertificate = {certificate:?}\nkey = {key:?}\nclient_ca = {ca:?}",);
    let file = cofferdam.file("tls.toml", format!("allow_emulation = true\n{config}"));
    let daemon = cofferdam.start_command([OsStr::new("daemon"), "--config".as_ref(), file.as_os_str()]);
    let addr = daemon.stdout_lines(1).remove(0);
    assert!(addr.starts_with("grpc+https://127.0.0.1:"), "{addr}");
    let as_client = |identity: Option<&[PathBuf; 2]>, arguments: &[&str]| {
        let mut variables = vec![("SSL_CERT_FILE", ca.as_path())];
        if let Some([certificate, key]) = identity {
            variables.extend([("COFFERDAM_TLS_CERTIFICATE", certificate.as_path()), ("COFFERDAM_TLS_KEY", key)]);
        }
        cofferdam.command_with(&variables, arguments)
    };
    let [one, other] = ["one", "other"].map(|name| sign(&authority, &cofferdam, name));
    // The build fails before a VM starts, which is enough to check its owner.
    let missing = format!("x=file:{}:7", B3Digest::of(b"missing"));
    let run = ["run", "--daemon", &addr, "--json", "--input", &missing, "--", "/bin/true"];
    as_client(Some(&one), &run).is_refused("missing").says(&format!("`cofferdam import --daemon {addr} PATH`"));
    let list = |identity| as_client(Some(identity), &["builds", "--daemon", &addr, "list"]).succeeds().stdout;
    let listed = list(&one);
    let (header, line) = listed.trim_end().split_once('\n').unwrap();
    assert_eq!(header, "ID\tSTATE\tAGE\tRAN\tCOMMAND");
    let (id, rest) = line.split_once('\t').unwrap();
    assert!(!rest.contains('\n'), "{listed}");
    assert_eq!(list(&other).trim_end(), header);
    // A renewed certificate, and one that names nobody.
    let renewed = sign(&authority, &cofferdam, "one");
    assert_eq!(list(&renewed), listed);
    let nameless = sign(&authority, &cofferdam, "");
    let refused = as_client(Some(&nameless), &["builds", "--daemon", &addr, "list"]);
    refused.exits_with(3).says("your certificate has no subject alternative name that is a URI, DNS name or e-mail");
    for verb in ["show", "log", "cancel"] {
        as_client(Some(&one), &["builds", "--daemon", &addr, verb, id]).succeeds();
        let refused = as_client(Some(&other), &["builds", "--daemon", &addr, verb, id]);
        refused.exits_with(2).says("you have no build with this id");
    }
    let anonymous = as_client(None, &["builds", "--daemon", &addr, "list"]);
    anonymous.exits_with(3).says("requires a client certificate").says("COFFERDAM_TLS_CERTIFICATE");
    let stranger = sign(&Authority::new(), &cofferdam, "stranger");
    let refused = as_client(Some(&stranger), &["builds", "--daemon", &addr, "list"]);
    refused.exits_with(3).says("refused this client's certificate").says("client_ca");
    let plain = addr.replace("https", "http");
    as_client(Some(&one), &["builds", "--daemon", &plain, "list"]).exits_with(3).says(&format!("name it as {addr}"));
    let elsewhere = cofferdam.file("elsewhere.pem", Authority::new().pem());
    let unknown = cofferdam.command_with(&[("SSL_CERT_FILE", &elsewhere)], ["builds", "--daemon", &addr, "list"]);
    unknown.exits_with(3).says("not signed by an authority that is trusted here").says("SSL_CERT_FILE");
    daemon.signal(Signal::SIGTERM);
    daemon.end().succeeds();
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_continue_a_clients_trace() {
    let mut collector = Collector::start(TcpListener::bind("127.0.0.1:0").unwrap());
    let cofferdam = Cofferdam::new();
    let daemon = Daemon::start(&cofferdam, &format!("[traces]\nendpoint = '{}'", collector.endpoint));
    // Its input is missing, so it fails without a machine.
    let mut request = cofferdam_tests::request::shell("true", &[]);
    let missing = Node::File { digest: B3Digest::of(b"missing"), size: 7, executable: false };
    request.inputs = vec![Entry::named("missing".try_into().unwrap(), missing)];
    let request = ours::BuildRequest { request: Some(encoded(request)), ..Default::default() };
    let mut request = Request::new(request);
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    let mut client = BuildServiceClient::new(daemon.peer().raw_channel());
    let mut events = client.build(request).await.unwrap().into_inner();
    while events.message().await.unwrap().is_some() {}
    drop(client);
    tokio::task::block_in_place(|| daemon.end().succeeds());
    let found = collector.spans();
    let build = found.iter().find(|span| span.name == "build").expect("the build has a span");
    assert_eq!(build.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes());
    assert_eq!(build.parent_span_id, 0xb7ad_6b71_6920_3331_u64.to_be_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_count_builds_and_traces_have_a_span_a_phase() {
    let mut collector = Collector::start(TcpListener::bind("127.0.0.1:0").unwrap());
    let cofferdam = Cofferdam::new();
    let config = format!("[metrics]\nlisten = '127.0.0.1:0'\n[traces]\nendpoint = '{}'", collector.endpoint);
    let log = [("COFFERDAM_LOG", OsStr::new("info")), ("COFFERDAM_LOG_FORMAT", OsStr::new("json"))];
    let daemon = Daemon::start_with(&cofferdam, &config, &log);
    let metrics = daemon.addrs(2).remove(1);
    let run = |script: &str| {
        let build = cofferdam.build().on(&daemon);
        build.shell(script).build_fails("exit_code")
    };
    tokio::task::block_in_place(|| run("echo 12345678; exit 3"));
    // The client gets the end before the scheduler does.
    let mut text = scrape(&metrics).unwrap();
    while !text.contains("\ncofferdam_builds_running 0\n") {
        assert!(daemon.running().age() < stretched(Duration::from_secs(300)), "{text}");
        text = scrape(&metrics).unwrap();
    }
    for line in [
        "cofferdam_builds_total{outcome=\"build_failed\",reason=\"exit_code\"} 1",
        "cofferdam_build_phase_seconds_count{phase=\"running\"} 1",
        "cofferdam_build_log_bytes_total 9",
        "cofferdam_builds_waiting{for=\"memory\"} 0",
        "cofferdam_budget{resource=\"builds\"} 1",
        "cofferdam_state_free_bytes",
    ] {
        assert!(text.lines().any(|found| found.starts_with(line)), "no {line} in {text}");
    }
    // The remaining spans are sent at the daemon's end.
    let ended = tokio::task::block_in_place(|| daemon.end().succeeds());
    let lines =
        ended.stderr.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a line is JSON"));
    let about_builds: Vec<_> = lines.filter(|line| line["target"].as_str().unwrap().contains("::scheduler")).collect();
    let said: Vec<_> = about_builds.iter().map(|line| line["message"].as_str().unwrap()).collect();
    assert_eq!(said, ["accepted", "started", "ended", "draining"]);
    let end = &about_builds[2];
    assert_eq!((&end["outcome"], &end["reason"]), (&"build_failed".into(), &"exit_code".into()), "{end}");
    assert!(end["build"] == about_builds[0]["build"] && end["log_bytes"] == 9, "{end}");
    let found = collector.spans();
    let build = found.iter().find(|span| span.name == "build").expect("the build has a span");
    for phase in ["queued", "resolving", "booting", "running"] {
        let span = found.iter().find(|span| span.name == phase).expect("each phase has a span");
        assert_eq!((&span.trace_id, &span.parent_span_id), (&build.trace_id, &build.span_id));
        assert!(build.start_time_unix_nano <= span.start_time_unix_nano);
        assert!(span.end_time_unix_nano <= build.end_time_unix_nano);
    }
}
