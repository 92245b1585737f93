//! Hash parts of store paths in contents, and others in their place.

use std::{
    io::{self, BufReader, Write},
    path::Path,
    thread,
};

use aho_corasick::AhoCorasick;
use cofferdam_castore::{
    Node, Store,
    archive::{ArchiveError, Limits},
    export::ExportError,
    nar,
};
use cofferdam_nix::StorePath;

use super::{outputs::Rejected, session::Stop};

/// Bytes of a hash part.
const LENGTH: usize = 32;

/// What is put in place of hash parts.
#[derive(Debug)]
pub(super) struct Rewrites {
    searcher: AhoCorasick,
    /// For each hash part that is searched for.
    replacements: Vec<[u8; LENGTH]>,
}

impl Rewrites {
    /// Puts the second hash part of each pair in place of the first one.
    pub(super) fn new<'a>(pairs: impl IntoIterator<Item = (&'a StorePath, [u8; LENGTH])>) -> Self {
        let (paths, replacements): (Vec<_>, _) = pairs.into_iter().unzip();
        let searcher = AhoCorasick::new(paths.into_iter().map(StorePath::hash_part));
        Self { searcher: searcher.expect("a hash part has 32 bytes, and outputs are few"), replacements }
    }
}

/// A path's hash part, as bytes of a known length.
pub(super) fn hash_part(path: &StorePath) -> [u8; LENGTH] {
    path.hash_part().as_bytes().try_into().expect("a hash part has 32 bytes")
}

/// Bytes on their way to `out`, which are rewritten.
pub(super) struct Rewriting<'a, W, F> {
    rewrites: &'a Rewrites,
    out: W,
    /// Is told the place of each hash part that is replaced.
    found: F,
    /// The last bytes, which may begin a hash part.
    held: Vec<u8>,
    /// The place of the first of them.
    at: u64,
}

impl<'a, W: Write, F: FnMut(u64) -> io::Result<()>> Rewriting<'a, W, F> {
    pub(super) fn new(rewrites: &'a Rewrites, out: W, found: F) -> Self {
        Self { rewrites, out, found, held: Vec::new(), at: 0 }
    }

    /// Writes what is held.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&self.held)?;
        self.out.flush()?;
        Ok(self.out)
    }
}

impl<W: Write, F: FnMut(u64) -> io::Result<()>> Write for Rewriting<'_, W, F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.held.extend_from_slice(bytes);
        let Rewrites { searcher, replacements } = self.rewrites;
        let found: Vec<_> = searcher.find_iter(&self.held).map(|found| (found.start(), found.pattern())).collect();
        let mut done = self.held.len().saturating_sub(LENGTH - 1);
        for (begin, pattern) in found {
            (self.found)(self.at + begin as u64)?;
            let end = begin + LENGTH;
            self.held[begin..end].copy_from_slice(&replacements[pattern.as_usize()]);
            done = done.max(end);
        }
        self.out.write_all(&self.held[..done])?;
        self.held.drain(..done);
        self.at += done as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The same node with other hash parts in its files, symbolic links and names.
///
/// # Errors
///
/// The names are in another order then, which an archive can't have; or the store failed.
pub(super) fn rewritten(store: &Store, path: &StorePath, node: &Node, rewrites: &Rewrites) -> Result<Node, Rejected> {
    let failed = |error: io::Error| Rejected::Stop(Stop::failed(&error));
    let (reader, writer) = io::pipe().map_err(failed)?;
    let write = move || {
        let mut out = Rewriting::new(rewrites, writer, |_| Ok(()));
        nar::write(store, node, Path::new(path.base_name()), &mut out, &|| false)?;
        let failed = |source| ExportError::Write { path: path.base_name().into(), action: "write it", source };
        out.finish().map(drop).map_err(failed)
    };
    thread::scope(|scope| {
        let writing = thread::Builder::new().name("nix rewriting".to_owned()).spawn_scoped(scope, write);
        let writing = writing.map_err(failed)?;
        let imported = nar::import(store, BufReader::new(reader), Limits::default());
        let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (imported, written) {
            (Ok(node), Ok(())) => Ok(node),
            // It ends early when the import does.
            (
                Err(error @ (ArchiveError::Malformed { .. } | ArchiveError::Limit { .. })),
                Ok(()) | Err(ExportError::Write { .. }),
            ) => Err(Rejected::Output(format!("the hash parts in output '{path}' can't be replaced: {error}"))),
            (Err(error), Ok(())) => Err(Rejected::Stop(Stop::failed(&error))),
            (_, Err(error)) => Err(Rejected::Stop(Stop::failed(&error))),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_parts_are_replaced_wherever_they_are_cut() {
        let [a, b, c] = ["ifd3pw9mq9a6wpq6c1jc7lgkdcdlay48", "rwfshijbhhchwxcmqy4ijrqa7jccs8qz", &"0".repeat(LENGTH)];
        let path = |part: &str| StorePath::from_base_name(&format!("{part}-a")).unwrap();
        let (paths, others) = ([a, b].map(path), [b, c].map(path));
        let rewrites = Rewrites::new(paths.iter().zip(others.iter().map(hash_part)));
        let bytes = format!("x{a}{a}{b}y{}{b}{}", &a[..31], &b[..31]);
        let expected = format!("x{b}{b}{c}y{}{c}{}", &a[..31], &b[..31]);
        for length in 1..=bytes.len() {
            let mut places = Vec::new();
            let mut rewriting = Rewriting::new(&rewrites, Vec::new(), |place| {
                places.push(place);
                Ok(())
            });
            bytes.as_bytes().chunks(length).for_each(|chunk| rewriting.write_all(chunk).unwrap());
            assert_eq!(String::from_utf8(rewriting.finish().unwrap()).unwrap(), expected, "{length}");
            assert_eq!(places, [1, 33, 65, 129], "{length}");
        }
    }
}
