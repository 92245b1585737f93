//! `build`: a request from a file.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use tokio_util::sync::CancellationToken;

use super::{CliError, ClientArgs, execute::ExecuteArgs, interrupt::blocking};
use crate::request::{BuildRequest, MAX_ENCODED_BYTES};

const EXAMPLES: &str = "\
Examples:
  Build what request.json asks for, outputs to ./result:
    cofferdam build request.json --out result
  A binary message from another program, the answer as JSON:
    other-program | cofferdam build --format binpb --json -";

/// Builds a snix.build.v1.BuildRequest
///
/// The request is ProtoJSON, or a binary message if the file's name ends in .binpb. Its inputs must be in the store. stdout
/// gets the same as from `run`; with --json a snix.build.v1.BuildResponse in ProtoJSON. With a daemon, the line before it has
/// the build's id: {"build":ID}.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct BuildArgs {
    /// The file that holds the request; - for stdin
    #[arg(value_name = "REQUEST")]
    request: PathBuf,
    /// The request's format [default: binpb if the file's name ends in .binpb, else json]
    #[arg(long, value_enum)]
    format: Option<Format>,
    #[command(flatten)]
    execute: ExecuteArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// ProtoJSON
    Json,
    /// A binary message
    Binpb,
}

impl BuildArgs {
    pub(super) async fn execute(self, client: &ClientArgs, cancel: &CancellationToken) -> Result<(), CliError> {
        let (path, format) = (self.request.clone(), self.format());
        // stdin can be slow: a program, or a person who types.
        let request = blocking(cancel, move || read(&path, format)).await?;
        self.execute.prepare(client, request)?.execute(cancel).await
    }

    fn format(&self) -> Format {
        let by_name = match self.request.extension() {
            Some(extension) if extension == "binpb" => Format::Binpb,
            _ => Format::Json,
        };
        self.format.unwrap_or(by_name)
    }
}

fn read(path: &Path, format: Format) -> Result<BuildRequest, CliError> {
    let bytes = if path == Path::new("-") { bounded(io::stdin().lock()) } else { File::open(path).and_then(bounded) };
    let bytes = bytes.map_err(|error| CliError::at_path(format!("can't read the request {path:?}"), error))?;
    Ok(match format {
        Format::Binpb => BuildRequest::from_binary(&bytes)?,
        Format::Json => match str::from_utf8(&bytes) {
            Ok(text) => BuildRequest::from_json(text)?,
            Err(error) => {
                return Err(CliError::wrong_because(format!("the request {path:?} is not JSON"), error)
                    .try_this("--format binpb, if it is a binary message"));
            }
        },
    })
}

/// Reads at most one byte more than a request may have: enough to refuse it.
fn bounded(source: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(MAX_ENCODED_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;
    use prost::Message;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parse(arguments: &[&str]) -> BuildArgs {
        let cli = Cli::try_parse_from(["cofferdam", "build"].iter().chain(arguments)).unwrap();
        match cli.command {
            Command::Build(args) => *args,
            _ => unreachable!(),
        }
    }

    #[test]
    fn the_format_follows_the_flag_or_else_the_name() {
        assert_eq!(parse(&["a.json"]).format(), Format::Json);
        assert_eq!(parse(&["a.binpb"]).format(), Format::Binpb);
        assert_eq!(parse(&["-"]).format(), Format::Json);
        assert_eq!(parse(&["-", "--format", "binpb"]).format(), Format::Binpb);
    }

    #[test]
    fn only_json_and_binary_requests_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = directory.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let json = write("a.json", br#"{"commandArgs":["true"]}"#);
        let request = read(&json, Format::Json).unwrap();
        let binary = write("a.binpb", &request.to_proto().encode_to_vec());
        assert_eq!(read(&binary, Format::Binpb).unwrap(), request);
        for (path, format) in [
            (write("b.json", b"\xff"), Format::Json),
            (write("c.json", b"{}"), Format::Json),
            (json, Format::Binpb),
            (directory.path().join("absent"), Format::Json),
            (directory.path().to_owned(), Format::Json),
        ] {
            assert_eq!(read(&path, format).unwrap_err().exit().code(), 2, "{path:?}");
        }
    }

    #[test]
    fn an_endless_request_is_refused() {
        let error = read(Path::new("/dev/zero"), Format::Binpb).unwrap_err();
        assert_eq!(error.exit().code(), 2);
    }
}
