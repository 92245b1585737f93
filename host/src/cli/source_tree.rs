//! The source tree of `run --source`.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use cofferdam_castore::{
    Node, Store,
    import::{Options, import_with},
};
use ignore::WalkBuilder;
use tokio_util::sync::CancellationToken;

use super::{
    CliError,
    interrupt::blocking,
    progress::{Counter, Progress},
    quantity::show_size,
};

/// Most bytes of a source tree. More is a mistake more often than not: a home directory, or the results of earlier builds.
const MAX_BYTES: u64 = 8 << 30;

/// A directory to copy into a build.
#[derive(Debug)]
pub(super) struct SourceTree {
    path: PathBuf,
    /// What isn't left out; nothing if that is everything.
    kept: Option<HashSet<PathBuf>>,
}

impl SourceTree {
    /// Looks at a directory, and for `gitignore` at what git ignores in it.
    ///
    /// # Errors
    ///
    /// It is no directory, can't be read, or is very large.
    pub(super) fn of(path: &Path, gitignore: bool) -> Result<Self, CliError> {
        let unreadable = |error| CliError::wrong_because(format!("--source {} can't be read", path.display()), error);
        let path = path.canonicalize().map_err(unreadable)?;
        if !path.is_dir() {
            return Err(CliError::wrong(format!("--source {} is no directory", path.display()))
                .try_this("--input NAME=FILE, for a single file"));
        }
        let mut walk = WalkBuilder::new(&path);
        walk.standard_filters(false).git_ignore(gitignore).git_exclude(gitignore).parents(gitignore);
        let mut kept = gitignore.then(HashSet::new);
        let mut bytes = 0_u64;
        for entry in walk.require_git(false).build() {
            let entry = entry.map_err(|error| {
                CliError::wrong_because(format!("--source {} can't be read", path.display()), error)
            })?;
            let size = entry.metadata().ok().filter(std::fs::Metadata::is_file).map_or(0, |metadata| metadata.len());
            bytes = bytes.saturating_add(size);
            if bytes > MAX_BYTES {
                let limit = show_size(MAX_BYTES);
                return Err(CliError::wrong(format!("--source {} holds more than {limit}", path.display())).try_this(
                    "--gitignore, which leaves out what git ignores; or `cofferdam import`, and its node as an --input",
                ));
            }
            if let Some(kept) = &mut kept {
                kept.insert(entry.into_path());
            }
        }
        Ok(Self { path, kept })
    }

    /// Imports it.
    pub(super) async fn import(
        self,
        store: &Store,
        progress: &Arc<Progress>,
        cancel: &CancellationToken,
    ) -> Result<Node, CliError> {
        progress.step("importing the source");
        let (store, counter) = (store.clone(), Counter::new("importing the source", progress));
        let work = move || {
            let observe = |files, bytes| counter.add(files, bytes);
            let leave_out = |path: &Path, _| self.kept.as_ref().is_some_and(|kept| !kept.contains(path));
            let options = Options { leave_out: Some(&leave_out), observe: Some(&observe), ..Options::default() };
            import_with(&store, &self.path, &options)
        };
        Ok(blocking(cancel, work).await?.0)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_git_ignores_is_left_out_on_request() {
        let directory = tempfile::tempdir().unwrap();
        for (name, contents) in [
            (".gitignore", "target/\n*.o\n!kept.o\n"),
            ("main.c", ""),
            ("main.o", ""),
            ("kept.o", ""),
            ("target/huge", ""),
            ("sub/.gitignore", "generated\n"),
            ("sub/generated", ""),
            ("sub/.hidden", ""),
        ] {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        assert!(SourceTree::of(directory.path(), false).unwrap().kept.is_none());
        let tree = SourceTree::of(directory.path(), true).unwrap();
        let kept = tree.kept.unwrap();
        let mut names: Vec<_> =
            kept.iter().map(|path| path.strip_prefix(&tree.path).unwrap().to_str().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, ["", ".gitignore", "kept.o", "main.c", "sub", "sub/.gitignore", "sub/.hidden"]);
    }

    #[test]
    fn what_is_no_source_tree_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("file"), "").unwrap();
        fs::create_dir(at("large")).unwrap();
        fs::File::create(at("large/sparse")).unwrap().set_len(MAX_BYTES + 1).unwrap();
        for (name, why) in [("missing", "can't be read"), ("file", "is no directory"), ("large", "more than 8.00 GiB")]
        {
            let error = SourceTree::of(&at(name), false).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
