//! Children of this process have no business with its Unix sockets: they serve one build, and its guest may have taken them
//! over.
//!
//! It is one wall of several. A child that may make processes can have a grandchild connect, which nothing here tells from
//! any other client; that it may not, and that it finds no socket, is up to the walls around it. A client in a container has a
//! PID namespace of its own, too, so that namespaces tell nothing.

use std::sync::Once;

use nix::{
    sys::wait::{Id, WaitPidFlag, waitid},
    unistd::Pid,
};

/// Whether a process is a child of this one. A dead one counts until it is reaped, since no other process has its number.
pub(crate) fn is_child(pid: i32) -> bool {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(Pid::from_raw(pid)), flags).is_ok()
}

/// Logs that a child was turned away. After the first time only at level debug: a child could fill the log.
pub(crate) fn log_refusal(pid: i32) {
    static FIRST: Once = Once::new();
    FIRST.call_once(|| {
        tracing::warn!(
            pid,
            "closed a connection of a process that this one has started: a guest may have taken it over; further ones are \
             logged at level debug"
        );
    });
    tracing::debug!(pid, "closed a connection of a process that this one has started");
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::parent_id, path::Path, process};

    use tokio::{io::AsyncReadExt as _, net::UnixListener, process::Command};
    use tokio_util::sync::CancellationToken;
    use tonic::service::RoutesBuilder;

    use super::*;
    use crate::{Clients, Listener};

    /// Connects to a socket, and prints how many bytes it is sent.
    const CONNECT: &str = "socket(my $s, PF_UNIX, SOCK_STREAM, 0); connect($s, pack_sockaddr_un($ARGV[0])) || die; \
                           print sysread($s, my $said, 9)";

    /// What [`CONNECT`] prints when `shell` runs it as `"$@"`.
    async fn told(socket: &Path, shell: &str) -> String {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", shell, "sh", "perl", "-MSocket", "-e", CONNECT]).arg(socket);
        let mut child = command.stdout(process::Stdio::piped()).spawn().unwrap();
        let mut printed = String::new();
        // What has the pipe may outlive the shell.
        child.stdout.take().unwrap().read_to_string(&mut printed).await.unwrap();
        child.wait().await.unwrap();
        printed
    }

    #[tokio::test]
    async fn a_child_is_turned_away_and_other_processes_are_served() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = Listener::Unix(UnixListener::bind(&path).unwrap());
        let mut routes = RoutesBuilder::default();
        routes.add_service(tonic_health::server::health_reporter().1);
        let serving = tokio::spawn(listener.serve(routes.routes(), Clients::default(), CancellationToken::new()));
        assert_eq!(told(&path, "exec \"$@\"").await, "0");
        // The settings of HTTP/2 come first.
        assert_eq!(told(&path, "\"$@\"; true").await, "9");
        serving.abort();
    }

    #[test]
    fn only_a_child_that_is_not_reaped_is_one() {
        let mut child = process::Command::new("/bin/true").spawn().unwrap();
        let pid = child.id().cast_signed();
        assert!(is_child(pid));
        child.wait().unwrap();
        assert!(!is_child(pid));
        assert!(!is_child(process::id().cast_signed()) && !is_child(parent_id().cast_signed()) && !is_child(0));
    }
}
