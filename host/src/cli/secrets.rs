//! `--secret`: files that only a build's command sees.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::Read as _,
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

use bytes::Bytes;
use cofferdam_proto::cofferdam::v1 as wire;
use zeroize::Zeroizing;

use super::{CliError, run::split};
use crate::build::secrets::{MAX_SECRET_BYTES, Secret, Secrets};

/// Reads the files of `NAME=FILE`.
pub(super) fn read(arguments: &[OsString]) -> Result<Secrets, CliError> {
    let named = arguments.iter().map(|argument| {
        let (name, path) = split("--secret", "NAME=FILE", argument)?;
        let name = str::from_utf8(name)
            .map_err(|error| CliError::wrong_because(format!("--secret {argument:?}: the name is not UTF-8"), error))?;
        Ok((name.to_owned(), Path::new(OsStr::from_bytes(path))))
    });
    let named = named.collect::<Result<Vec<_>, CliError>>()?;
    // Names first: reading can take a while, as from a pipe.
    Secrets::new(
        named.iter().map(|(name, _)| Secret { name: name.clone(), contents: Zeroizing::default() }).collect(),
    )?;
    let secrets = named.into_iter().map(|(name, path)| Ok(Secret { contents: contents(&name, path)?, name }));
    Ok(Secrets::new(secrets.collect::<Result<_, CliError>>()?)?)
}

/// Reads at most one byte more than a secret may have. The buffer never grows: copies of it would stay in memory.
fn contents(name: &str, path: &Path) -> Result<Zeroizing<Vec<u8>>, CliError> {
    let mut contents = Zeroizing::new(Vec::with_capacity(MAX_SECRET_BYTES + 1));
    let read = File::open(path).and_then(|file| file.take(MAX_SECRET_BYTES as u64 + 1).read_to_end(&mut contents));
    read.map_err(|error| CliError::at_path(format!("--secret {name}: {path:?} can't be read"), error))?;
    if contents.len() > MAX_SECRET_BYTES {
        let limit = format!("{} MiB, the most for a secret", MAX_SECRET_BYTES >> 20);
        return Err(CliError::wrong(format!("--secret {name}: {path:?} is larger than {limit}"))
            .try_this("--input NAME=PATH, if it is no secret"));
    }
    Ok(contents)
}

/// As a daemon is told.
pub(super) fn message(secrets: &Secrets) -> Vec<wire::Secret> {
    let secret = |secret: &Secret| wire::Secret {
        name: secret.name.clone(),
        contents: Bytes::copy_from_slice(&secret.contents),
    };
    secrets.iter().map(secret).collect()
}
