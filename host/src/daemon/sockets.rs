//! Where the daemon listens: sockets of its own, or those that systemd has made.

use std::{
    fs,
    io::{self, ErrorKind},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::{
            fs::{FileTypeExt as _, PermissionsExt as _},
            net as unix,
        },
    },
    path::{Path, PathBuf},
};

use cofferdam_rpc::{Listener, Tls};
use nix::sys::{
    socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrLike as _, SockaddrStorage, UnixAddr, bind, getsockname,
        listen, socket,
    },
    stat::{Mode, fchmod},
};
use tokio::net::{TcpListener, UnixListener};

/// Listeners, and the sockets among them that are removed at the end.
#[derive(Default)]
pub(super) struct Sockets {
    made: Vec<PathBuf>,
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for path in &self.made {
            // Whatever stays is taken over by the next that listens there.
            let _ = fs::remove_file(path);
        }
    }
}

impl Sockets {
    /// A listener, and the address by which clients reach it.
    pub(super) async fn bind(&mut self, addr: &str, tls: Option<&Tls>, mode: u32) -> io::Result<(Listener, String)> {
        if !addr.starts_with('/') {
            return tcp(TcpListener::bind(addr).await?, tls);
        }
        let path = Path::new(addr);
        let listener = match bind_unix(path, mode) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && is_abandoned(path) => {
                fs::remove_file(path)?;
                bind_unix(path, mode)?
            }
            bound => bound?,
        };
        self.made.push(path.to_owned());
        Ok((Listener::Unix(UnixListener::from_std(listener)?), format!("grpc+unix://{addr}")))
    }
}

/// Never with more than its permissions: Linux takes them from the socket when it makes the file, less the umask.
fn bind_unix(path: &Path, mode: u32) -> io::Result<unix::UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&socket, Mode::from_bits_truncate(mode))?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket.into())
}

/// The sockets that systemd passes on, each as a listener and the address by which clients reach it.
pub(super) fn inherited(tls: Option<&Tls>) -> io::Result<Vec<(Listener, String)>> {
    let descriptors: Vec<_> = sd_notify::listen_fds()?.collect();
    let listener = |descriptor| {
        let family = getsockname::<SockaddrStorage>(descriptor)?.family();
        // SAFETY: whoever starts a process with LISTEN_FDS hands over these descriptors, which nothing else here uses.
        let owned = unsafe { OwnedFd::from_raw_fd(descriptor) };
        if family == Some(AddressFamily::Unix) {
            let listener = unix::UnixListener::from(owned);
            listener.set_nonblocking(true)?;
            let addr = listener.local_addr()?;
            let path = addr.as_pathname().unwrap_or(Path::new("")).display().to_string();
            return Ok((Listener::Unix(UnixListener::from_std(listener)?), format!("grpc+unix://{path}")));
        }
        let listener = std::net::TcpListener::from(owned);
        listener.set_nonblocking(true)?;
        tcp(TcpListener::from_std(listener)?, tls)
    };
    descriptors.into_iter().map(listener).collect()
}

/// Why some addresses need [`allow_anonymous_tcp`](super::Config).
pub(super) const ANONYMOUS: &str = "anybody who reaches this address could build and read the store";
pub(super) const ANONYMOUS_ADVICE: &str = "require client certificates with --tls-client-ca ([tls] client_ca), or listen on 127.0.0.1 or a Unix socket; or \
     accept anybody with --allow-anonymous-tcp (allow_anonymous_tcp = true)";

fn tcp(listener: TcpListener, tls: Option<&Tls>) -> io::Result<(Listener, String)> {
    let at = listener.local_addr()?;
    Ok(match tls {
        Some(tls) => (Listener::Tls(listener, tls.clone()), format!("grpc+https://{at}")),
        None => (Listener::Tcp(listener), format!("grpc+http://{at}")),
    })
}

/// Whether the socket there is one that nobody listens on any more.
fn is_abandoned(path: &Path) -> bool {
    unix::UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        && fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}
