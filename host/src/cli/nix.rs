//! `nix-daemon` and `nix-store`: connections of Nix to a daemon.

use std::{
    env,
    io::{self, ErrorKind, Read as _, Write as _},
    thread,
};

use clap::Args;
use cofferdam_proto::cofferdam::v1::NixBytes;
use futures::stream;
use tokio::{sync::mpsc, task::block_in_place};
use tokio_util::sync::CancellationToken;

use super::{
    CliError, ClientArgs,
    remote::{Daemon, Protocol},
};

/// Bytes of one piece.
const PIECE_BYTES: usize = 64 * 1024;

/// Pieces on their way to the daemon.
const BUFFERED_PIECES: usize = 4;

const EXAMPLES: &str = "\
Examples:
  nix build --store 'ssh-ng://builder?remote-program=cofferdam%20nix-daemon' nixpkgs#hello
  command=\"cofferdam nix-daemon --stdio --client alice\",restrict ssh-ed25519 AAAA…    (a line of authorized_keys)";

/// Lets Nix build with a daemon: speaks Nix's worker protocol on stdin and stdout
///
/// As the forced command of a key it also speaks the serve protocol, if the client asks for `nix-store --serve`.
///
/// The daemon is the one of --daemon or COFFERDAM_DAEMON, else the one at daemon.sock in the state directory.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct NixDaemonArgs {
    /// Speak on stdin and stdout, as Nix asks for
    #[arg(long, required = true)]
    stdio: bool,
    #[command(flatten)]
    who: Who,
}

#[derive(Debug, Args)]
struct Who {
    /// Whose connection it is, as key:NAME: the holder of the key that this is the forced command of
    ///
    /// The daemon believes it only of users in `[nix] speakers` of its configuration.
    #[arg(long = "client", value_name = "NAME")]
    name: Option<String>,
}

const STORE_EXAMPLES: &str = "\
Examples:
  nix-build -j0 --builders 'ssh://builder?remote-program=cofferdam%20nix-store x86_64-linux' …
  command=\"cofferdam nix-store --serve --write\",restrict ssh-ed25519 AAAA…    (a line of authorized_keys)";

/// Lets Nix build with a daemon: speaks Nix's serve protocol on stdin and stdout
///
/// It is what Nix speaks over ssh:// and with bare host names. The log goes to stderr. The daemon is the one of --daemon or
/// COFFERDAM_DAEMON, else the one at daemon.sock in the state directory.
#[derive(Debug, Args)]
#[command(after_help = STORE_EXAMPLES)]
pub(super) struct NixStoreArgs {
    /// Speak on stdin and stdout, as Nix asks for
    #[arg(long, required = true)]
    serve: bool,
    /// Take paths and build, as Nix asks for; always allowed
    #[arg(long)]
    write: bool,
    #[command(flatten)]
    who: Who,
}

impl NixDaemonArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let protocol = match env::var("SSH_ORIGINAL_COMMAND") {
            Ok(command) if is_serve(&command) => Protocol::Serve,
            _ => Protocol::Worker,
        };
        connect(protocol, &self.who, client, cancel).await
    }
}

impl NixStoreArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        connect(Protocol::Serve, &self.who, client, cancel).await
    }
}

/// Whether a client of ssh has asked for `nix-store --serve`, whatever its forced command is.
fn is_serve(command: &str) -> bool {
    let mut words = command.split_whitespace();
    let program = words.next().map(|word| word.rsplit('/').next().unwrap_or(word));
    program == Some("nix-store") && words.any(|word| word == "--serve")
}

async fn connect(
    protocol: Protocol,
    Who { name }: &Who,
    client: &ClientArgs,
    cancel: &CancellationToken,
) -> Result<(), CliError> {
    let daemon = Daemon::at_or_own(client.daemon())?;
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(CliError::interrupted()),
        pumped = pump(&daemon, protocol, name.as_deref()) => pumped,
    }
}

/// Passes bytes on in both directions until the daemon ends the conversation.
async fn pump(daemon: &Daemon, protocol: Protocol, name: Option<&str>) -> Result<(), CliError> {
    let (sender, mut pieces) = mpsc::channel(BUFFERED_PIECES);
    let failed = |error| CliError::failed("can't start a thread", error);
    // It ends with the process, since nothing interrupts its reading.
    thread::Builder::new().name("stdin".to_owned()).spawn(move || forward(&sender)).map_err(failed)?;
    let mut answers = daemon.nix(protocol, name, stream::poll_fn(move |context| pieces.poll_recv(context))).await?;
    while let Some(NixBytes { data, log }) = answers.message().await.map_err(|status| daemon.refused(&status))? {
        let written = block_in_place(|| {
            // Nobody may read it.
            let _ = io::stderr().lock().write_all(&log);
            let mut stdout = io::stdout().lock();
            stdout.write_all(&data).and_then(|()| stdout.flush())
        });
        match written {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            written => written.map_err(|error| CliError::failed("can't write to stdout", error))?,
        }
    }
    Ok(())
}

/// Sends stdin to its end, or until nobody listens.
fn forward(pieces: &mpsc::Sender<NixBytes>) {
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        match io::stdin().lock().read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) | Ok(0) => return,
            Ok(read) => {
                let data = buffer[..read].to_vec().into();
                if pieces.blocking_send(NixBytes { data, ..NixBytes::default() }).is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_that_ssh_was_asked_for_chooses_the_protocol() {
        for command in ["nix-store --serve --write", "/usr/bin/nix-store --serve"] {
            assert!(is_serve(command), "{command}");
        }
        for command in ["", "nix-daemon --stdio", "nix-store --query", "echo nix-store --serve", "my-nix-store --serve"]
        {
            assert!(!is_serve(command), "{command}");
        }
    }
}
