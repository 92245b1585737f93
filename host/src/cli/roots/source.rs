//! What names a root on the command line.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
};

use crate::cli::{
    CliError,
    node_text::{self, Reference},
};

/// What `--help` says about roots.
pub(in crate::cli) const HELP: &str = "\
Roots:
  NAME                     a root that `cofferdam store root add` has named
  NODE or DIGEST           a directory of the store
  ./DIR or /DIR            a directory of this host
  tar:FILE                 a tar archive of a root, such as one of `debootstrap` or `docker export`
  docker-archive:FILE      an image, saved by `docker save`
  oci:PATH, oci:PATH:NAME  an image in an OCI layout, a directory or a tar archive of it
  oci://HOST/NAME:TAG, oci://HOST/NAME@sha256:HEX
                           an image in a registry";

/// Where a root comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) enum Source {
    /// A name, or else a directory.
    Named(String),
    Store(Reference),
    Directory(PathBuf),
    Image(ImageSource),
}

/// A file, directory or registry with an image or a root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) enum ImageSource {
    /// A tar archive of a root.
    Tar(PathBuf),
    /// An archive of `docker save`.
    Docker(PathBuf),
    /// An OCI layout, and perhaps the name of one of its images.
    Layout(PathBuf, Option<String>),
    /// What follows `oci://`.
    Registry(String),
}

impl Source {
    pub(in crate::cli) fn parse(argument: &OsStr) -> Result<Self, CliError> {
        let bytes = argument.as_bytes();
        let path = |bytes: &[u8]| PathBuf::from(OsString::from(OsStr::from_bytes(bytes)));
        if bytes.starts_with(b"oci:") {
            return Ok(Self::Image(ImageSource::oci(argument)?));
        }
        if let Some(file) = bytes.strip_prefix(b"docker-archive:") {
            return Ok(Self::Image(ImageSource::Docker(path(file))));
        }
        if let Some(file) = bytes.strip_prefix(b"tar:") {
            return Ok(Self::Image(ImageSource::Tar(path(file))));
        }
        match argument.to_str() {
            Some("") => {
                Err(CliError::wrong("a root can't be empty").try_this("a name, a directory, a node or an image"))
            }
            Some(text) if node_text::is_reference(text) => match text.parse() {
                Ok(reference) => Ok(Self::Store(reference)),
                Err(error) => Err(CliError::wrong(format!("the root {text:?}: {error}"))),
            },
            Some(text) if !text.contains('/') && !matches!(text, "." | "..") => Ok(Self::Named(text.to_owned())),
            _ => Ok(Self::Directory(path(bytes))),
        }
    }
}

impl ImageSource {
    /// An OCI image, with or without `oci:` before it.
    pub(in crate::cli) fn oci(argument: &OsStr) -> Result<Self, CliError> {
        let bytes = argument.as_bytes();
        let bytes = bytes.strip_prefix(b"oci:").unwrap_or(bytes);
        if let Some(registry) = bytes.strip_prefix(b"//") {
            let registry = str::from_utf8(registry);
            let registry = registry.map_err(|_| CliError::wrong(format!("{argument:?} is not UTF-8")))?;
            return Ok(Self::Registry(registry.to_owned()));
        }
        let path = PathBuf::from(OsStr::from_bytes(bytes));
        if let Some(at) = bytes.iter().rposition(|&byte| byte == b':')
            && !path.exists()
            && let Ok(name) = str::from_utf8(&bytes[at + 1..])
        {
            return Ok(Self::Layout(OsStr::from_bytes(&bytes[..at]).into(), Some(name.to_owned())));
        }
        Ok(Self::Layout(path, None))
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_castore::B3Digest;

    use super::*;

    #[test]
    fn roots_are_told_by_how_they_begin() {
        let parse = |text: &str| Source::parse(text.as_ref()).unwrap();
        let image = |image| Source::Image(image);
        let digest = B3Digest::of(b"");
        for (text, expected) in [
            ("debian-12", Source::Named("debian-12".into())),
            ("./debian-12", Source::Directory("./debian-12".into())),
            ("/", Source::Directory("/".into())),
            (".", Source::Directory(".".into())),
            (&digest.to_string(), Source::Store(Reference::Digest(digest))),
            ("tar:a.tar", image(ImageSource::Tar("a.tar".into()))),
            ("docker-archive:a:b.tar", image(ImageSource::Docker("a:b.tar".into()))),
            ("oci:layout", image(ImageSource::Layout("layout".into(), None))),
            ("oci:none:1.0", image(ImageSource::Layout("none".into(), Some("1.0".into())))),
            ("oci:/", image(ImageSource::Layout("/".into(), None))),
            ("oci://host/name:tag", image(ImageSource::Registry("host/name:tag".into()))),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
        for wrong in ["", "dir:x"] {
            assert_eq!(Source::parse(wrong.as_ref()).unwrap_err().exit().code(), 2, "{wrong}");
        }
    }
}
