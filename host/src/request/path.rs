//! Paths as `snix.build.v1` wants them: clean, so that equal places have one spelling.

use std::{fmt, path::Path};

/// Longest path, in bytes (`PATH_MAX` of Linux, without its NUL).
pub const MAX_PATH_BYTES: usize = 4095;

/// Longest component of a path, in bytes (`NAME_MAX` of Linux).
pub const MAX_COMPONENT_BYTES: usize = 255;

/// A clean path relative to the build's root; empty for the root itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelativePath(String);

impl RelativePath {
    /// Checks a path.
    ///
    /// # Errors
    ///
    /// The rule that it breaks, as "must …".
    pub fn new(path: &str) -> Result<Self, &'static str> {
        match path.as_bytes() {
            [] => Ok(Self::default()),
            [b'/', ..] => Err("must be relative to the build's root, without a leading slash"),
            _ => check_components(path, path).map(|()| Self(path.to_owned())),
        }
    }

    /// The path as text, without slashes at its ends.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The build's root itself.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this is `other` or lies within it.
    pub fn is_within(&self, other: &Self) -> bool {
        // `Path` compares by components, and `x/` begins with the empty path.
        self.as_path().starts_with(other.as_path())
    }

    /// The same path for functions of the file system.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl fmt::Display for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A clean absolute path of the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AbsolutePath(String);

impl AbsolutePath {
    /// Checks a path.
    ///
    /// # Errors
    ///
    /// The rule that it breaks, as "must …".
    pub fn new(path: &str) -> Result<Self, &'static str> {
        match path.strip_prefix('/') {
            None => Err("must be absolute"),
            Some("") => Ok(Self(path.to_owned())),
            Some(below) => check_components(path, below).map(|()| Self(path.to_owned())),
        }
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn check_components(whole: &str, relative: &str) -> Result<(), &'static str> {
    if whole.contains('\0') {
        return Err("must not hold a NUL");
    }
    if whole.len() > MAX_PATH_BYTES {
        return Err("must not be longer than 4095 bytes");
    }
    for component in relative.split('/') {
        match component {
            "" => return Err("must not hold a superfluous slash"),
            "." | ".." => return Err("must not hold \".\" or \"..\""),
            _ if component.len() > MAX_COMPONENT_BYTES => {
                return Err("must not have a component of more than 255 bytes");
            }
            _ => {}
        }
    }
    Ok(())
}

/// The rules of clean paths, each with a path that breaks it; what every field with the rule is tested with.
#[cfg(test)]
pub(super) fn unclean() -> Vec<(&'static str, String)> {
    vec![
        ("superfluous slash", "a//b".into()),
        ("superfluous slash", "a/".into()),
        ("\".\" or \"..\"", ".".into()),
        ("\".\" or \"..\"", "a/./b".into()),
        ("\".\" or \"..\"", "a/..".into()),
        ("NUL", "a\0b".into()),
        ("255", "a".repeat(MAX_COMPONENT_BYTES + 1)),
        ("4095", vec!["a".repeat(MAX_COMPONENT_BYTES); 17].join("/")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unclean_paths_are_refused_with_their_rule() {
        for (rule, path) in unclean() {
            let error = RelativePath::new(&path).unwrap_err();
            assert!(error.contains(rule), "{path:?}: {error}");
            let error = AbsolutePath::new(&format!("/{path}")).unwrap_err();
            assert!(error.contains(rule), "/{path:?}: {error}");
        }
        assert!(RelativePath::new("/a").unwrap_err().contains("leading slash"));
        assert!(RelativePath::new("/").unwrap_err().contains("leading slash"));
        assert!(AbsolutePath::new("a").unwrap_err().contains("absolute"));
        assert!(AbsolutePath::new("").unwrap_err().contains("absolute"));
        assert!(AbsolutePath::new("//").unwrap_err().contains("superfluous slash"));
    }

    #[test]
    fn clean_paths_are_taken_as_they_are() {
        for path in ["", "a", "a/b", "...", "a/.b", "ä", &"a".repeat(MAX_COMPONENT_BYTES)] {
            assert_eq!(RelativePath::new(path).unwrap().as_str(), path);
            let absolute = format!("/{path}");
            assert_eq!(AbsolutePath::new(&absolute).unwrap().as_str(), absolute);
        }
        let longest = vec!["a".repeat(MAX_COMPONENT_BYTES); 16].join("/");
        assert_eq!(longest.len(), MAX_PATH_BYTES);
        RelativePath::new(&longest).unwrap();
    }

    #[test]
    fn within_counts_whole_components() {
        let path = |path: &str| RelativePath::new(path).unwrap();
        assert!(path("a/b").is_within(&path("a")));
        assert!(path("a").is_within(&path("a")));
        assert!(path("a").is_within(&path("")));
        assert!(!path("ab").is_within(&path("a")));
        assert!(!path("").is_within(&path("a")));
    }
}
