//! Arguments of the whole command line: which store, which daemon, and JSON.

use clap::Args;
use cofferdam_castore::Store;
use serde_json::Value;

use super::{CliError, StoreAddrs, print, progress::Progress};

/// Which store.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Store and daemon")]
pub(super) struct StoreArgs {
    /// Where blobs are: memory://, file:///DIRECTORY, objectstore+URL (file, s3, gs, az, https, …),
    /// cache:///DIRECTORY?size=SIZE&remote=ADDR, a cache in front of the store ADDR, or grpc+http://HOST:PORT,
    /// grpc+https://HOST:PORT or grpc+unix:///SOCKET [default: the daemon's store, or without a daemon one in the state
    /// directory]
    #[arg(long, global = true, env = "BLOB_SERVICE_ADDR", value_name = "ADDR")]
    pub(super) blob_service_addr: Option<String>,
    /// Where directories are: memory://, redb:///FILE, objectstore+URL, cache:///DIRECTORY?size=SIZE&remote=ADDR or over
    /// gRPC as blobs [default: as for blobs]
    #[arg(long, global = true, env = "DIRECTORY_SERVICE_ADDR", value_name = "ADDR")]
    pub(super) directory_service_addr: Option<String>,
}

impl StoreArgs {
    /// The addresses that are given. No daemon is asked for the others.
    pub(super) fn addrs(&self) -> StoreAddrs {
        StoreAddrs { blobs: self.blob_service_addr.clone(), directories: self.directory_service_addr.clone() }
    }
}

/// What every command of a client takes.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct ClientArgs {
    #[command(flatten)]
    pub(super) store: StoreArgs,
    /// Let a daemon build, and use its store: grpc+unix:///SOCKET, grpc+http://HOST:PORT or grpc+https://HOST:PORT
    #[arg(long, global = true, value_name = "ADDR", env = "COFFERDAM_DAEMON", help_heading = "Store and daemon")]
    pub(super) daemon: Option<String>,
    /// Print JSON to stdout: one object, or one object a line; a failure is an object with kind, reason, message and fields
    #[arg(long, global = true, help_heading = "Results")]
    pub(super) json: bool,
    /// Write no progress, notices and warnings to stderr, only errors. What a build writes still comes
    #[arg(long, short, global = true, help_heading = "Results")]
    pub(super) quiet: bool,
}

impl ClientArgs {
    /// Progress and notices on stderr.
    pub(super) fn progress(&self) -> Progress {
        Progress::new(self.quiet)
    }

    /// The daemon's address. An empty variable names none.
    pub(super) fn daemon(&self) -> Option<&str> {
        self.daemon.as_deref().filter(|addr| !addr.is_empty())
    }

    /// The addresses of the store: those that are given, else the daemon's.
    pub(super) fn store_addrs(&self) -> StoreAddrs {
        match self.daemon() {
            Some(addr) => self.store.addrs().or(&StoreAddrs::of_daemon(addr)),
            None => self.store.addrs(),
        }
    }

    /// Opens the store.
    pub(super) fn open_store(&self) -> Result<Store, CliError> {
        Ok(self.store_addrs().open()?)
    }

    /// The daemon whose store is used.
    pub(super) fn daemon_of_store(&self) -> Option<&str> {
        self.daemon().filter(|addr| self.store_addrs() == StoreAddrs::of_daemon(addr))
    }

    /// Prints a result in one of its two forms.
    pub(super) fn print(&self, text: &str, object: &Value) -> Result<(), CliError> {
        if self.json { print(&format!("{object}\n")) } else { print(text) }
    }

    /// Refuses `--json` where stdout gets the bytes of something else.
    pub(super) fn refuse_json(&self, what: &str) -> Result<(), CliError> {
        match self.json {
            true => Err(CliError::wrong(format!("--json can't be combined with this: stdout gets {what}"))
                .try_this("leave out --json")),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(blobs: &str, daemon: &str) -> ClientArgs {
        let given = |text: &str| Some(text.to_owned());
        let store = StoreArgs { blob_service_addr: given(blobs), directory_service_addr: None };
        ClientArgs { store, daemon: given(daemon), ..ClientArgs::default() }
    }

    #[test]
    fn the_store_is_the_daemons_unless_an_address_is_given() {
        let daemon = "grpc+unix:///socket";
        let followed = args("", daemon);
        assert_eq!(followed.store_addrs(), StoreAddrs::of_daemon(daemon));
        assert_eq!(followed.daemon_of_store(), Some(daemon));
        let mixed = args("memory://", daemon);
        let addrs = ("memory://".to_owned(), daemon.to_owned());
        assert_eq!(mixed.store_addrs().resolve().unwrap(), addrs);
        assert_eq!(mixed.daemon_of_store(), None);
        let without = args("memory://", "");
        assert_eq!((without.daemon(), without.store_addrs()), (None, without.store.addrs()));
    }
}
