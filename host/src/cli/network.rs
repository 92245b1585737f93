//! The network of builds on this host.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::Args;
use cofferdam_proto::{EncodedNetwork, cofferdam::v1::Network};

use super::CliError;
use crate::network::{AddressRule, CaFile, Grant, Policy, Resolvers, Rule, Rules};

/// What builds may connect to.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Network")]
pub(super) struct NetworkArgs {
    /// Let the build connect to this host if it asks for the network: NAME or *.NAME for HTTP and HTTPS, NAME:PORT for another
    /// port; with " tls=false" behind it, connections need not name the server by TLS. The default for everything is no; with
    /// a daemon, it is what the daemon allows, and nothing beyond that can be allowed
    #[arg(long, value_name = "NAME[:PORT]")]
    allow_host: Vec<Rule>,
    /// Let the build connect to these addresses without a name, even if they are private
    #[arg(long, value_name = "ADDRESS/PREFIX:PORT")]
    allow_address: Vec<AddressRule>,
    /// Resolve names by this DNS server [default: those of /etc/resolv.conf]
    #[arg(long, value_name = "ADDRESS:PORT")]
    resolver: Vec<SocketAddr>,
    /// CA certificates in PEM that the build finds in /etc/ssl/certs/ca-certificates.crt, instead of its root's
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

impl NetworkArgs {
    /// Whether builds that ask for the network have one.
    pub(super) fn is_given(&self) -> bool {
        !self.allow_host.is_empty() || !self.allow_address.is_empty()
    }

    /// The flag that is given, and needs a build on this host.
    pub(super) fn flag(&self) -> Option<&'static str> {
        let flags = [("--resolver", !self.resolver.is_empty()), ("--ca-file", self.ca_file.is_some())];
        flags.into_iter().find(|(_, is_given)| *is_given).map(|(flag, _)| flag)
    }

    /// The connections that a daemon is asked for; nothing for all that it allows.
    pub(super) fn message(&self) -> Option<EncodedNetwork> {
        self.is_given().then(|| {
            EncodedNetwork::from(&Network {
                allow: self.allow_host.iter().map(ToString::to_string).collect(),
                allow_addresses: self.allow_address.iter().map(ToString::to_string).collect(),
            })
        })
    }

    /// What a build gets of the network if it asks for that.
    pub(super) fn grant(&self) -> Result<Option<Grant>, CliError> {
        if !self.is_given() {
            return Ok(None);
        }
        let resolvers = match &self.resolver[..] {
            [] => Resolvers::of_host().map_err(|error| {
                let error = CliError::failed("no DNS server is known", error);
                error.try_this("--resolver ADDRESS:PORT")
            })?,
            given => Resolvers::new(given.to_vec()),
        };
        let (allow, allow_addresses) = (self.allow_host.clone(), self.allow_address.clone());
        let rules = Rules { allow, allow_addresses, ..Rules::default() };
        let ca_file = self.ca_file.as_deref().map(CaFile::read).transpose();
        let ca_file = ca_file.map_err(|error| {
            let path = self.ca_file.as_deref().unwrap_or(Path::new(""));
            CliError::wrong_because(format!("--ca-file {} can't be used", path.display()), error)
        })?;
        Ok(Some(Grant::new(Policy { ca_file, ..Policy::new(rules, resolvers) })))
    }
}
