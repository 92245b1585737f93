use std::{fmt, net::IpAddr};

use super::Digest;

/// Longest name of a repository, and longest host, in bytes.
const MAX_NAME_BYTES: usize = 255;

/// Longest tag, in bytes.
const MAX_TAG_BYTES: usize = 128;

const DEFAULT_TAG: &str = "latest";

/// An image of a registry: `HOST[:PORT]/NAME[:TAG][@sha256:HEX]`. With a digest, the tag has no effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reference {
    host: String,
    name: String,
    tag: String,
    digest: Option<Digest>,
    plain: bool,
}

impl Reference {
    /// Parses what follows `oci://`. `plain` allows HTTP for every registry, not only for those of this host.
    ///
    /// # Errors
    ///
    /// The rule that it breaks.
    pub(crate) fn parse(text: &str, plain: bool) -> Result<Self, String> {
        let (host, rest) = text.split_once('/').ok_or("must be oci://HOST/NAME:TAG or oci://HOST/NAME@sha256:HEX")?;
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse()?)),
            None => (rest, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) => (name, tag),
            None => (rest, DEFAULT_TAG),
        };
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
        if host.is_empty() || host.len() > MAX_NAME_BYTES || !host.bytes().all(is_host) {
            return Err(format!("its host {host:?} must be a name or an address, and perhaps a port"));
        }
        let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
        let is_part = |part: &str| !matches!(part, "" | "." | "..") && part.bytes().all(is_name);
        if name.len() > MAX_NAME_BYTES || !name.split('/').all(is_part) {
            return Err(format!("its name {name:?} must be of lower-case letters, digits, dots, dashes and slashes"));
        }
        let is_tag = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if tag.is_empty() || tag.len() > MAX_TAG_BYTES || tag.starts_with(['.', '-']) || !tag.bytes().all(is_tag) {
            return Err(format!("its tag {tag:?} must be of letters, digits, dots, dashes and underscores"));
        }
        let (host, name, tag) = (host.to_owned(), name.to_owned(), tag.to_owned());
        Ok(Self { host, name, tag, digest, plain })
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The digest, or else the tag.
    pub(super) fn version(&self) -> String {
        self.digest.map_or_else(|| self.tag.clone(), |digest| digest.to_string())
    }

    /// Whether the registry is on this host.
    pub(super) fn is_loopback(&self) -> bool {
        let address = match self.host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => self.host.split(':').next().unwrap_or_default(),
        };
        address == "localhost" || address.parse().is_ok_and(|address: IpAddr| address.is_loopback())
    }

    /// Whether HTTP is spoken.
    pub(super) fn is_plain(&self) -> bool {
        self.plain || self.is_loopback()
    }

    /// The registry's URL.
    pub(super) fn base(&self) -> String {
        format!("{}://{}", if self.is_plain() { "http" } else { "https" }, self.host)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "oci://{}/{}", self.host, self.name)?;
        match self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => write!(f, ":{}", self.tag),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_have_a_host_a_name_and_a_version() {
        let digest = Digest::of(b"");
        let shown = |text: &str| Reference::parse(text, false).unwrap().to_string();
        assert_eq!(shown("registry.example/a/b-c.d_e:1.0"), "oci://registry.example/a/b-c.d_e:1.0");
        assert_eq!(shown("registry.example:5000/a"), "oci://registry.example:5000/a:latest");
        assert_eq!(shown(&format!("[::1]:5000/a:t@{digest}")), format!("oci://[::1]:5000/a@{digest}"));
        for (wrong, rule) in [
            ("registry.example", "must be oci://HOST/NAME:TAG"),
            ("/a", "its host"),
            ("user@registry/a", "its host"),
            ("h/", "its name"),
            ("h/../x", "its name"),
            ("h/a//b", "its name"),
            ("h/A", "its name"),
            ("h/a%2e:x", "its name"),
            ("h/a:", "its tag"),
            ("h/a:-x", "its tag"),
            ("h/a:x?y", "its tag"),
            ("h/a@sha256:x", "64 hexadecimal digits"),
            ("h/a@md5:x", "64 hexadecimal digits"),
        ] {
            let error = Reference::parse(wrong, false).unwrap_err();
            assert!(error.contains(rule), "{wrong}: {error}");
        }
    }

    #[test]
    fn only_loopback_gets_http_without_being_asked() {
        let base = |text: &str, plain| Reference::parse(text, plain).unwrap().base();
        for loopback in ["localhost/a", "localhost:5000/a", "127.0.0.1:5000/a", "127.9.9.9/a", "[::1]:5000/a"] {
            assert!(base(loopback, false).starts_with("http://"), "{loopback}");
        }
        for other in ["localhost.example/a", "10.0.0.1/a", "registry.example:5000/a", "[::2]/a", "127.0.0.1.example/a"]
        {
            assert!(base(other, false).starts_with("https://"), "{other}");
        }
        assert_eq!(base("10.0.0.1:5000/a", true), "http://10.0.0.1:5000");
    }
}
