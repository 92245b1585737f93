//! `verify`: checks a signed statement of how outputs were made, and the outputs themselves.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use clap::Args;
use cofferdam_castore::{Store, import::import_path};
use serde_json::Value;

use super::{CliError, ClientArgs, node_text};
use crate::{
    build::failure::{Failure, FailureKind},
    machine::jail::one_line,
    provenance::{self, MAX_ENVELOPE_BYTES, PublicKey, Subject},
};

const EXAMPLES: &str = "\
Examples:
  cofferdam builds provenance --public-key > daemon.pem
  cofferdam builds provenance 0197b3a2-… > statement.json
  cofferdam verify statement.json --key daemon.pem
  With the outputs, as `run --out result` wrote them:
    cofferdam verify statement.json --key daemon.pem --out result";

/// Checks the signed statement of how a build's outputs were made, without a daemon
///
/// Prints who built what, when, and the outputs. If the statement has no valid signature of the key, or an output below --out is
/// another, it exits with 1. With --json stdout gets the statement.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct VerifyArgs {
    /// The statement, as `builds provenance` prints it; - for stdin
    statement: PathBuf,
    /// The daemon's public key: Ed25519, in PEM
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Check the outputs below DIR, too, each at its own path
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl VerifyArgs {
    pub(super) fn execute(self, client: &ClientArgs) -> Result<(), CliError> {
        let key = PublicKey::read(&self.key)
            .map_err(|error| CliError::wrong_because(format!("can't use the key {}", self.key.display()), error))?;
        let shown = self.statement.display();
        let envelope = read(&self.statement)
            .map_err(|error| CliError::at_path(format!("can't read the statement {shown}"), error))?;
        let statement = provenance::verify(&envelope, key)
            .map_err(|error| not_verified(format!("the statement {shown} is not to be trusted: {error}")))?;
        let subjects = provenance::subjects(&statement)
            .map_err(|rule| CliError::wrong(format!("the statement {shown} is signed, but {rule}")))?;
        if let Some(out) = &self.out {
            subjects.iter().try_for_each(|subject| check(out, subject))?;
        }
        client.print(&sheet(&statement, &subjects), &statement)
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let source: Box<dyn io::Read> =
        if path == Path::new("-") { Box::new(io::stdin()) } else { Box::new(File::open(path)?) };
    let mut contents = Vec::new();
    source.take(MAX_ENVELOPE_BYTES + 1).read_to_end(&mut contents)?;
    if contents.len() as u64 > MAX_ENVELOPE_BYTES {
        return Err(io::Error::other(format!("it is larger than {MAX_ENVELOPE_BYTES} bytes")));
    }
    Ok(contents)
}

/// Compares an output with the statement's.
fn check(out: &Path, subject: &Subject) -> Result<(), CliError> {
    let path = out.join(&subject.path);
    let found = import_path(&Store::digests_only(), &path)
        .map_err(|error| CliError::wrong_because(format!("can't read the output {}", path.display()), error))?;
    let found = node_text::format(&found);
    if found == subject.node {
        return Ok(());
    }
    Err(not_verified(format!("{} is {found}, and the statement says {}", path.display(), subject.node)))
}

fn not_verified(message: String) -> CliError {
    Failure { kind: FailureKind::BuildFailed, ..Failure::executor("not_verified", message) }.into()
}

fn sheet(statement: &Value, subjects: &[Subject]) -> String {
    let run = &statement["predicate"]["runDetails"];
    let definition = &statement["predicate"]["buildDefinition"];
    let rows = [
        ("build", &run["metadata"]["invocationId"]),
        ("builder", &run["builder"]["id"]),
        ("client", &definition["externalParameters"]["tenant"]),
        ("command", &definition["externalParameters"]["command"]),
        ("finished", &run["metadata"]["finishedOn"]),
    ];
    let text = |value: &Value| one_line(value.as_str().unwrap_or_default());
    let mut sheet: String = rows.into_iter().map(|(name, value)| format!("{name}\t{}\n", text(value))).collect();
    for Subject { path, node } in subjects {
        sheet += &format!("output\t{} {}\n", one_line(node), one_line(path));
    }
    sheet
}
