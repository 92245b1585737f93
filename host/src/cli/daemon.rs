//! `daemon`: flags over the configuration file.

use std::path::PathBuf;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::{CliError, StoreArgs, print};
use crate::daemon::{self, Config, ListenAddr, Overrides, TlsConfig};

const EXAMPLES: &str = "\
Examples:
  For this user, on a socket in the state directory:
    cofferdam daemon
    cofferdam run --daemon grpc+unix://$HOME/.local/state/cofferdam/daemon.sock --bin-sh -- /bin/sh -c 'echo hello'
  For other machines that have a certificate of ours:
    cofferdam daemon --listen '[::]:8000' --tls-certificate host.pem --tls-key host.key --tls-client-ca clients.pem
  As a service (docs/daemon.md):
    cofferdam daemon --config /etc/cofferdam/daemon.toml";

/// Builds for others, and serves the store, over gRPC
///
/// Speaks snix.build.v1, tvix.build.v1, cofferdam.v1, snix.castore.v1 and tvix.castore.v1. Prints one line for each address
/// that it listens on, as clients write it. The first signal lets running builds end.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct DaemonArgs {
    /// The configuration (TOML); flags have precedence
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the configuration and end
    #[arg(long, requires = "config")]
    check_config: bool,
    /// Where to listen: HOST:PORT, or the path of a Unix socket, which begins with a slash [default: sockets that systemd
    /// passes on, or daemon.sock in the state directory]. A HOST:PORT other than loopback needs client certificates, or
    /// allow_anonymous_tcp in the configuration
    #[arg(long, value_name = "ADDR")]
    listen: Vec<ListenAddr>,
    /// The chain of certificates (PEM) to serve every HOST:PORT with TLS
    #[arg(long, requires = "tls_key", value_name = "FILE")]
    tls_certificate: Option<PathBuf>,
    /// The key (PEM) of the first certificate
    #[arg(long, requires = "tls_certificate", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Require client certificates signed by these CAs (PEM)
    #[arg(long, requires = "tls_certificate", value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
    /// Accept clients from other machines without client certificates
    #[arg(long)]
    allow_anonymous_tcp: bool,
    /// Run builds by emulation where KVM doesn't work, though that is no security boundary
    #[arg(long)]
    allow_emulation: bool,
}

impl DaemonArgs {
    pub(super) async fn execute(self, store: &StoreArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let mut config = self.config.as_deref().map_or_else(|| Ok(Config::default()), Config::read)?;
        let tls = self.tls_certificate.zip(self.tls_key);
        config.override_with(Overrides {
            listen: self.listen,
            tls: tls.map(|(certificate, key)| TlsConfig { certificate, key, client_ca: self.tls_client_ca }),
            allow_anonymous_tcp: self.allow_anonymous_tcp,
            allow_emulation: self.allow_emulation,
            store: store.addrs(),
        });
        if self.check_config {
            return Ok(daemon::check(&config)?);
        }
        // Nobody need read the addresses.
        let listening = |addr: &str| drop(print(&format!("{addr}\n")));
        Ok(daemon::run(&config, &listening, cancel).await?)
    }
}
