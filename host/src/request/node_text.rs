//! One line of text for a node, the same in `import`, `export` and `run`.
//!
//! ```text
//!   dir:DIGEST:SIZE           a directory, with its size in castore: twice the number of entries below it
//!   file:DIGEST:BYTES         a file
//!   file:DIGEST:BYTES:x       an executable file
//!   link:TARGET               a symbolic link; bytes beyond [A-Za-z0-9] and -._/+:@,= as %XX
//! ```
//!
//! None of it needs quoting in a shell.

use std::str::FromStr;

use cofferdam_castore::{B3Digest, Node, SymlinkTarget};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

/// What no shell or reader could take for anything else stays as it is.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'/')
    .remove(b'+')
    .remove(b':')
    .remove(b'@')
    .remove(b',')
    .remove(b'=');

/// What `--help` says about nodes.
pub(crate) const HELP: &str = "\
Nodes:
  dir:DIGEST:SIZE      a directory, with its size in castore: twice the number of entries below it
  file:DIGEST:BYTES    a file; with :x at the end, an executable one
  link:TARGET          a symbolic link; odd bytes as %XX
  DIGEST is blake3- and base64. Alone it stands for the directory that has it, else for a file
  that is not executable. A path that begins like a node or a digest needs a ./ before it.";

/// Text that is not a node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a node: {rule}")]
pub(crate) struct NodeTextError {
    text: String,
    rule: String,
}

/// A node as text.
pub(crate) fn format(node: &Node) -> String {
    match node {
        Node::Directory { digest, size } => format!("dir:{digest}:{size}"),
        Node::File { digest, size, executable: false } => format!("file:{digest}:{size}"),
        Node::File { digest, size, executable: true } => format!("file:{digest}:{size}:x"),
        Node::Symlink { target } => {
            format!("link:{}", percent_encoded(target.as_bytes()))
        }
    }
}

/// Bytes as text: odd ones as `%XX`.
pub(crate) fn percent_encoded(bytes: &[u8]) -> String {
    percent_encode(bytes, ENCODED).to_string()
}

/// What text stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reference {
    /// A node, whole.
    Node(Node),
    /// A digest of a directory or a blob.
    Digest(B3Digest),
}

/// Whether the text looks like a [`Reference`].
pub(crate) fn is_reference(text: &str) -> bool {
    ["dir:", "file:", "link:", "blake3-"].iter().any(|prefix| text.starts_with(prefix))
}

impl FromStr for Reference {
    type Err = NodeTextError;

    fn from_str(text: &str) -> Result<Self, NodeTextError> {
        let refused = |rule: String| NodeTextError { text: text.chars().take(100).collect(), rule };
        let digest = |text: &str| text.parse::<B3Digest>().map_err(|error| refused(error.to_string()));
        let size = |text: &str| {
            text.parse::<u64>().map_err(|_| refused("its size must be a number from 0 to 18446744073709551615".into()))
        };
        if let Some(target) = text.strip_prefix("link:") {
            let target =
                decode(target).ok_or_else(|| refused("% must be followed by two hexadecimal digits".into()))?;
            let target = SymlinkTarget::try_from(target).map_err(|error| refused(error.to_string()))?;
            return Ok(Self::Node(Node::Symlink { target }));
        }
        match text.split(':').collect::<Vec<_>>()[..] {
            [alone] if alone.starts_with("blake3-") => digest(alone).map(Self::Digest),
            ["dir", of, entries] => Ok(Self::Node(Node::Directory { digest: digest(of)?, size: size(entries)? })),
            ["file", of, bytes] => {
                Ok(Self::Node(Node::File { digest: digest(of)?, size: size(bytes)?, executable: false }))
            }
            ["file", of, bytes, "x"] => {
                Ok(Self::Node(Node::File { digest: digest(of)?, size: size(bytes)?, executable: true }))
            }
            _ => Err(refused(
                "write dir:DIGEST:SIZE, file:DIGEST:BYTES, file:DIGEST:BYTES:x, link:TARGET or a digest".into(),
            )),
        }
    }
}

/// `None` if a `%` is followed by anything but two hexadecimal digits, which the crate would leave as it is.
fn decode(text: &str) -> Option<Vec<u8>> {
    let decoded: Vec<_> = percent_decode_str(text).collect();
    (decoded.len() + 2 * text.matches('%').count() == text.len()).then_some(decoded)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_kind_has_its_form() {
        let digest = B3Digest::of(b"");
        for (node, expected) in [
            (Node::Directory { digest, size: 7 }, format!("dir:{digest}:7")),
            (Node::File { digest, size: 0, executable: false }, format!("file:{digest}:0")),
            (Node::File { digest, size: 0, executable: true }, format!("file:{digest}:0:x")),
            (Node::Symlink { target: "../a b%\u{fc}".try_into().unwrap() }, "link:../a%20b%25%C3%BC".to_owned()),
        ] {
            assert_eq!(format(&node), expected);
            assert_eq!(expected.parse(), Ok(Reference::Node(node)));
            assert!(is_reference(&expected));
        }
        assert_eq!(digest.to_string().parse(), Ok(Reference::Digest(digest)));
    }

    #[test]
    fn other_text_is_refused_with_the_rule() {
        let digest = B3Digest::of(b"");
        for (text, rule) in [
            ("foo".to_owned(), "write dir:"),
            ("blake3-x".to_owned(), "base64"),
            ("dir:blake3-x:1".to_owned(), "base64"),
            (format!("dir:{digest}"), "write dir:"),
            (format!("dir:{digest}:-1"), "size"),
            (format!("file:{digest}:1:y"), "write dir:"),
            ("link:".to_owned(), "empty"),
            ("link:%2".to_owned(), "two hexadecimal"),
            ("link:%00".to_owned(), "NUL"),
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(rule), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn targets_of_any_bytes_come_back(target in proptest::collection::vec(1..=u8::MAX, 1..64)) {
            let node = Node::Symlink { target: target.try_into().unwrap() };
            let text = format(&node);
            prop_assert!(text.bytes().all(|byte| byte.is_ascii_graphic()));
            prop_assert_eq!(text.parse(), Ok(Reference::Node(node)));
        }
    }
}
