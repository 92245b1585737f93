//! Runs a command on a host whose internet is made for tests: `network-lab LOG COMMAND [ARGUMENT]…`
//!
//! ```text
//!   one user namespace, made without privileges
//!   ┌─ network namespace: the host ──────┐        ┌─ another: the internet ──────────────┐
//!   │ COMMAND                            │  veth  │ servers at public, private and other │
//!   │ a server at an address of its own  │────────│ addresses · DNS at 10.0.0.53         │
//!   └────────────────────────────────────┘        └──────────────────────────────────────┘
//! ```
//!
//! The log gets a line for each connection that a server accepts, each query, and each request to the proxy. So whoever sent a SYN is in it.

mod dns;
mod proxy;
mod servers;

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio, exit, id},
};

use anyhow::{Context as _, ensure};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{prctl::set_pdeathsig, signal::Signal},
    unistd::{getegid, geteuid},
};

/// The argument by which this program is the internet.
const INTERNET: &str = "--internet";

/// The argument by which it is the host's own servers.
const OWN_SERVERS: &str = "--own-servers";

/// Addresses of the internet's servers.
const ADDRESSES: [&str; 12] = [
    "93.184.215.14",
    "93.184.215.15",
    "10.0.0.5",
    "10.0.0.53",
    "100.64.0.1",
    "169.254.169.254",
    "172.16.0.1",
    "192.168.0.1",
    "198.51.100.1",
    "168.63.129.16",
    "2606:2800:21f::14",
    "64:ff9b::a9fe:a9fe",
];

/// A public address of the host itself.
const OWN: &str = "45.33.32.1";

fn main() -> anyhow::Result<()> {
    let mut arguments = env::args_os().skip(1);
    let first = arguments.next().context("network-lab LOG COMMAND [ARGUMENT]…")?;
    if first == INTERNET || first == OWN_SERVERS {
        set_pdeathsig(Signal::SIGKILL)?;
        let log = arguments.next().context("it needs a log")?;
        return if first == INTERNET { internet(Path::new(&log)) } else { own_servers(Path::new(&log)) };
    }
    let program = arguments.next().context("it needs a command")?;
    new_user_namespace()?;
    let mut internet = Command::new("/proc/self/exe");
    internet.arg(INTERNET).arg(&first).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut internet = internet.spawn().context("the internet can't be started")?;
    let mut said = BufReader::new(internet.stdout.take().context("it has a pipe")?);
    let mut tell = internet.stdin.take().context("it has a pipe")?;
    let mut wait = |what: &str| {
        let mut line = String::new();
        said.read_line(&mut line)?;
        ensure!(line.trim() == what, "the internet says {line:?} instead of {what:?}");
        Ok(())
    };
    wait("namespace")?;
    ip("link set lo up")?;
    ip(&format!("link add name host type veth peer name net netns {}", internet.id()))?;
    ip("link set host up")?;
    ip("address add 10.99.0.1/24 dev host")?;
    ip("address add fd99::1/64 dev host nodad")?;
    ip(&format!("address add {OWN}/32 dev lo"))?;
    // The second of a subnet, and one that is the host's by a route alone: a socket that is connected there has another address.
    ip("address add 45.33.33.1/24 dev host")?;
    ip("address add 45.33.33.2/24 dev host")?;
    ip("-6 route add local 2606:2801::/64 dev lo")?;
    writeln!(tell, "link")?;
    wait("servers")?;
    ip("route add default via 10.99.0.2")?;
    ip("route add default via fd99::2")?;
    // The IPv6 address of `dead.example` is in no network of this host's.
    ip("-6 route add unreachable 2606:2802::/64 dev lo")?;
    let mut own = Command::new("/proc/self/exe");
    let mut own =
        own.arg(OWN_SERVERS).arg(&first).stdout(Stdio::piped()).spawn().context("servers can't be started")?;
    let mut line = String::new();
    BufReader::new(own.stdout.take().context("it has a pipe")?).read_line(&mut line)?;
    ensure!(line.trim() == "servers", "the host's own servers say {line:?}");
    // In this very process, so that signals and the end are the command's. The servers end with it.
    let error = Command::new(&program).args(arguments).exec();
    Err(error).with_context(|| format!("{} can't be started", program.display()))
}

/// Root of a user namespace, in a network without anything.
fn new_user_namespace() -> anyhow::Result<()> {
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).context("no user namespace can be made")?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    Ok(())
}

/// Servers of the host itself.
fn own_servers(log: &Path) -> anyhow::Result<()> {
    servers::start(log)?;
    println!("servers");
    loop {
        std::thread::park();
    }
}

fn internet(log: &Path) -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    println!("namespace");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    if line.trim() != "link" {
        eprintln!("network-lab {}: nobody waits for the internet", id());
        exit(1);
    }
    ip("link set lo up")?;
    ip("link set net up")?;
    ip("address add 10.99.0.2/24 dev net")?;
    ip("address add fd99::2/64 dev net nodad")?;
    for address in ADDRESSES {
        let (prefix, more) = if address.contains(':') { (128, " nodad") } else { (32, "") };
        ip(&format!("address add {address}/{prefix} dev lo{more}"))?;
    }
    servers::start(log)?;
    dns::start(log)?;
    proxy::start(log)?;
    println!("servers");
    loop {
        std::thread::park();
    }
}

fn ip(arguments: &str) -> anyhow::Result<()> {
    let status = Command::new("ip").args(arguments.split(' ')).status().context("ip can't be started")?;
    ensure!(status.success(), "ip {arguments}: {status}");
    Ok(())
}
