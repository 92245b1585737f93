//! Looks at the daemon's page with Chromium: by keyboard alone, in a narrow and in a wide window, in light and dark colours, with
//! 10,000 builds and a log of 100 MB, and prints how long its pages take. The pictures are for people to look at.

mod chromium;
mod look;

use std::{env, fs, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use chromium::Chromium;
use cofferdam_castore::{
    B3Digest, Node,
    grpc::{Peer, PeerOptions},
    proto::{Entry, EntryExt as _},
};
use cofferdam_proto::cofferdam::v1::{self as ours, build_service_client::BuildServiceClient};
use cofferdam_tests::{
    Authority, Cofferdam, Daemon, Running,
    processes::peak_resident_bytes,
    request::{encoded, shell},
};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use look::Look;
use tonic::transport::Identity;

/// Builds that fail for want of an input.
const BUILDS: usize = 10_000;

/// Whose builds they are.
const TENANT: &str = "uri:\"><script>alert(1)</script><img/src=//example.invalid/x/onerror=alert(1)>";

/// In command lines and a log.
const HOSTILE: &str = "<script>alert('x')</script><img src=//example.invalid/x onerror=alert(1)>";

/// The name of an output.
const OUTPUT: &str = "build/<img src=x onerror=alert(1)>";

/// Writes 100 MB of log, and an output with a file of a hostile name and a program.
const LARGE: &str = "printf '\\033[1;32mok\\033[0m \\033[38;5;208morange\\033[0m %s\\n' \"$HOSTILE\"; \
    x=$(printf '%099d' 7); y=$(for i in 1 2 3 4 5 6 7 8 9 10; do echo $x; done); \
    i=0; while [ $i -lt 100000 ]; do echo \"$y\"; i=$((i+1)); done; printf '\\033[31mneedle\\033[0m at the end\\n'; \
    mkdir -p \"$OUT/sub\"; echo '<b>' > \"$OUT/<b>.html\"; cp /bin/sh \"$OUT/sub/tool\"";

/// Most bytes by which the pages may raise the daemon's peak memory.
const MOST_MEMORY_BYTES: u64 = 128 << 20;

fn main() -> Result<()> {
    let pictures = env::args_os().nth(1).unwrap_or_else(|| "target/page".into());
    let pictures = Path::new(&pictures);
    fs::create_dir_all(pictures)?;
    let cofferdam = Cofferdam::new();
    let authority = Authority::new();
    let daemon = Daemon::start(&cofferdam, &config(&cofferdam, &authority));
    let addresses = daemon.addrs(3);
    let address = |scheme: &str| addresses.iter().find(|address| address.starts_with(scheme)).context("no address");
    tokio::runtime::Runtime::new()?.block_on(many_builds(address("grpc+https:")?, &authority))?;
    println!("{BUILDS} builds have ended");
    let large = format!("HOSTILE=\"{HOSTILE}\"; OUT='{}'; {LARGE}", OUTPUT.trim_start_matches("build/"));
    cofferdam.build().on(&daemon).output(OUTPUT).shell(&large).succeeds();
    println!("a build has a log of 100 MB");
    cofferdam.build().on(&daemon).shell("echo about to fail >&2; exit 3").build_fails("exit_code");
    let runs = cofferdam.build().on(&daemon).start_shell("i=0; while true; do echo step $i; i=$((i+1)); sleep 1; done");
    runs.wait_for("step 1");
    // There is room for one.
    let waits = cofferdam.build().on(&daemon).start_shell("echo it waited");
    while active(&cofferdam, &daemon).len() < 2 {
        thread::sleep(Duration::from_millis(100));
    }
    let looked = look(&cofferdam, &daemon, address("https:")?, pictures);
    end(&cofferdam, &daemon, [waits, runs]);
    daemon.end().succeeds();
    looked?;
    println!("the page does what it should; see the pictures in {}", pictures.display());
    Ok(())
}

fn config(cofferdam: &Cofferdam, authority: &Authority) -> String {
    let [certificate, key] = authority.sign(None);
    let ca = cofferdam.file("ca.pem", authority.pem());
    let (certificate, key) = (cofferdam.file("host.pem", certificate), cofferdam.file("host.key", key));
    let me = nix::unistd::geteuid();
    format!(
        "listen = ['127.0.0.1:0']
        [tls]
        certificate = {certificate:?}
        key = {key:?}
        client_ca = {ca:?}
        [web]
        listen = '127.0.0.1:0'
        [queue]
        max = 20000
        max_per_client = 20000
        [tenants.'user:{me}']
        stored = '100G'
        disk = '1T'
        [tenants.'{TENANT}']
        records = '1G'"
    )
}

/// Has the hostile tenant submit all its builds.
async fn many_builds(address: &str, authority: &Authority) -> Result<()> {
    let [certificate, key] = authority.sign(Some(TENANT));
    let options = PeerOptions {
        authority: Some(authority.pem().into()),
        identity: Some(Identity::from_pem(certificate, key)),
        ..PeerOptions::default()
    };
    let channel = Peer::from_addr(address, &options)?.raw_channel();
    let missing = Node::File { digest: B3Digest::of(b"missing"), size: 7, executable: false };
    let build = |number: usize| {
        let mut client = BuildServiceClient::new(channel.clone());
        let mut request = shell(&format!("{HOSTILE} {number}"), &[]);
        request.inputs = vec![Entry::named("x".try_into().expect("it is a name"), missing.clone())];
        let request = ours::BuildRequest { request: Some(encoded(request)), ..Default::default() };
        async move {
            let mut events = client.build(request).await?.into_inner();
            while events.message().await?.is_some() {}
            anyhow::Ok(())
        }
    };
    stream::iter((0..BUILDS).map(build)).buffer_unordered(32).try_collect::<Vec<()>>().await.map(drop)
}

/// The ids of builds that wait or run.
fn active(cofferdam: &Cofferdam, daemon: &Daemon) -> Vec<String> {
    let list = cofferdam.command(["builds", "--daemon", &daemon.addr(), "list", "--active"]).succeeds().stdout;
    list.lines().skip(1).filter_map(|line| line.split('\t').next()).map(str::to_owned).collect()
}

/// Signs in and looks at all pages, whose making may take no more memory than this.
fn look(cofferdam: &Cofferdam, daemon: &Daemon, address: &str, pictures: &Path) -> Result<()> {
    let peak = || peak_resident_bytes(daemon.running().pid().unsigned_abs()).context("the daemon is gone");
    let token = cofferdam.command(["web-token", "--daemon", &daemon.addr()]).succeeds().stdout;
    let before = peak()?;
    let dir = tempfile::tempdir()?;
    let mut look = Look { browser: Chromium::start(dir.path())?, address, pictures };
    look.at_all(token.trim())?;
    let more = peak()?.saturating_sub(before);
    println!("all this raised the daemon's peak memory by {} MiB", more >> 20);
    ensure!(more <= MOST_MEMORY_BYTES, "the pages took {more} bytes of the daemon's memory");
    Ok(())
}

/// Cancels the builds that go on.
fn end(cofferdam: &Cofferdam, daemon: &Daemon, running: [Running; 2]) {
    for id in active(cofferdam, daemon) {
        cofferdam.command(["builds", "--daemon", &daemon.addr(), "cancel", &id]).succeeds();
    }
    for build in running {
        build.end().executor_fails("interrupted");
    }
}
