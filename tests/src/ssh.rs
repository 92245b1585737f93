//! A real sshd on a port of loopback that the kernel has picked.

use std::{
    fs,
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::{fd::OwnedFd, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use crate::Cofferdam;

const SSHD: &str = "/usr/sbin/sshd";

/// The directory into which sshd locks its processes. It is made in a mount namespace of its own, where nothing else sees it.
const START: &str = "mount -t tmpfs none /run && mkdir /run/sshd && exec \"$@\"";

/// Serves connections until dropped, each with an sshd of its own, as inetd does.
#[derive(Debug)]
pub struct Sshd {
    directory: PathBuf,
    port: u16,
    is_over: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Sshd {
    /// Serves the holder of one key, whose connections run this command whatever they ask for.
    #[track_caller]
    pub fn start(cofferdam: &Cofferdam, forced_command: &str) -> Self {
        assert!(Path::new(SSHD).exists(), "{SSHD} is missing: `images/setup.sh test` installs it");
        let directory = cofferdam.files().join("ssh");
        fs::create_dir(&directory).expect("it is there once");
        for key in ["host_key", "user_key"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", key, "-f"])
                .arg(directory.join(key))
                .status();
            assert!(made.expect("ssh-keygen is there").success());
        }
        let public = |key: &str| fs::read_to_string(directory.join(key)).expect("it was made just now");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let file = |name: &str, text: String| cofferdam.file(&format!("ssh/{name}"), text);
        file("known_hosts", format!("[127.0.0.1]:{port} {}", public("host_key.pub")));
        let keys = file(
            "authorized_keys",
            format!("command=\"{}\",restrict {}", forced_command.replace('"', "\\\""), public("user_key.pub")),
        );
        fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).expect("it was made just now");
        let config = file(
            "sshd_config",
            format!(
                "HostKey {0}/host_key\nAuthorizedKeysFile {0}/authorized_keys\nStrictModes no\nUsePAM no\n\
                 PasswordAuthentication no\nPermitRootLogin forced-commands-only\nLogLevel ERROR\n",
                directory.display()
            ),
        );
        let is_over = Arc::new(AtomicBool::new(false));
        let server = thread::spawn({
            let is_over = Arc::clone(&is_over);
            move || serve(&listener, &config, &is_over)
        });
        Self { directory, port, is_over, server: Some(server) }
    }

    /// The options with which ssh reaches it, for `NIX_SSHOPTS`.
    pub fn options(&self) -> String {
        let directory = self.directory.display();
        format!(
            "-F none -p {} -i {directory}/user_key -o IdentitiesOnly=yes -o BatchMode=yes \
             -o StrictHostKeyChecking=yes -o UserKnownHostsFile={directory}/known_hosts",
            self.port
        )
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).map(|stream| stream.shutdown(Shutdown::Both));
        let _ = self.server.take().map(JoinHandle::join);
    }
}

fn serve(listener: &TcpListener, config: &Path, is_over: &AtomicBool) {
    let mut children: Vec<Child> = Vec::new();
    while let Ok((stream, _)) = listener.accept() {
        if is_over.load(Ordering::Acquire) {
            break;
        }
        let input = OwnedFd::from(stream);
        let output = input.try_clone().expect("there are descriptors");
        let sshd = Command::new("unshare")
            .args(["--mount", "sh", "-ec", START, "sh", SSHD, "-i", "-e", "-f"])
            .arg(config)
            .stdin(input)
            .stdout(output)
            .spawn();
        children.push(sshd.expect("unshare is there"));
    }
    for mut child in children {
        let _ = child.wait();
    }
}
