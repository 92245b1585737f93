//! `nix-daemon` and `nix-store`: connections of Nix to a daemon.

use std::{
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
  command=\"cofferdam nix-daemon --stdio\",restrict ssh-ed25519 AAAA…    (a line of authorized_keys)";

/// Lets Nix build with a daemon: speaks Nix's worker protocol on stdin and stdout
///
/// The daemon is the one of --daemon or COFFERDAM_DAEMON, else the one at daemon.sock in the state directory.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct NixDaemonArgs {
    /// Speak on stdin and stdout, as Nix asks for
    #[arg(long, required = true)]
    stdio: bool,
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
}

impl NixDaemonArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        connect(Protocol::Worker, client, cancel).await
    }
}

impl NixStoreArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        connect(Protocol::Serve, client, cancel).await
    }
}

async fn connect(protocol: Protocol, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
    let daemon = Daemon::at_or_own(client.daemon())?;
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(CliError::interrupted()),
        pumped = pump(&daemon, protocol) => pumped,
    }
}

/// Passes bytes on in both directions until the daemon ends the conversation.
async fn pump(daemon: &Daemon, protocol: Protocol) -> Result<(), CliError> {
    let (sender, mut pieces) = mpsc::channel(BUFFERED_PIECES);
    let failed = |error| CliError::failed("can't start a thread", error);
    // It ends with the process, since nothing interrupts its reading.
    thread::Builder::new().name("stdin".to_owned()).spawn(move || forward(&sender)).map_err(failed)?;
    let mut answers = daemon.nix(protocol, stream::poll_fn(move |context| pieces.poll_recv(context))).await?;
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
