//! What an image runs on.

use std::{env::consts, fmt, str::FromStr};

use serde::Deserialize;

/// A platform in the words of images, such as `linux/amd64` or `linux/arm/v7`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub(crate) struct Platform {
    os: String,
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

impl Platform {
    /// The platform of this host's builds.
    pub(crate) fn host() -> Self {
        let architecture = match consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self { os: consts::OS.to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    /// Whether an image for `image` is wanted. A platform without a variant accepts any.
    pub(super) fn accepts(&self, image: &Self) -> bool {
        self.os == image.os
            && self.architecture == image.architecture
            && (self.variant.is_none() || self.variant == image.variant)
    }

    /// Whether it stands for something that is no image, such as an attestation.
    pub(super) fn is_none(&self) -> bool {
        self.os == "unknown"
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = [Some(&self.os), Some(&self.architecture), self.variant.as_ref()];
        let text: Vec<_> = text.into_iter().flatten().map(|part| part.escape_default().to_string()).collect();
        f.write_str(&text.join("/"))
    }
}

impl FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<_> = text.split('/').map(str::to_owned).collect();
        match &parts[..] {
            _ if parts.iter().any(String::is_empty) => {}
            [os, architecture] => {
                return Ok(Self { os: os.clone(), architecture: architecture.clone(), variant: None });
            }
            [os, architecture, variant] => {
                let variant = Some(variant.clone());
                return Ok(Self { os: os.clone(), architecture: architecture.clone(), variant });
            }
            _ => {}
        }
        Err("write OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, such as linux/amd64".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_matter_where_they_are_named() {
        let platform = |text: &str| text.parse::<Platform>().unwrap();
        assert!(platform("linux/arm").accepts(&platform("linux/arm/v7")));
        assert!(platform("linux/arm/v7").accepts(&platform("linux/arm/v7")));
        assert!(!platform("linux/arm/v6").accepts(&platform("linux/arm/v7")));
        assert!(!platform("linux/amd64").accepts(&platform("linux/arm64")));
        assert!(!platform("linux/amd64").accepts(&platform("windows/amd64")));
        assert_eq!(platform("linux/arm/v7").to_string(), "linux/arm/v7");
        assert_eq!(Platform::host().to_string(), "linux/amd64");
        for wrong in ["", "linux", "linux/", "/amd64", "a/b/c/d", "a//b"] {
            assert!(wrong.parse::<Platform>().is_err(), "{wrong}");
        }
    }
}
