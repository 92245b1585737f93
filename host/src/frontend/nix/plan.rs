//! Which derivations are built next.
//!
//! ```text
//!   waiting ── all that it needs is there ──▶ ready ──next()──▶ running ──ended()──▶ a result
//!      └────── one that it needs has failed: DependencyFailed ──────────────────────────┘
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use cofferdam_nix::{
    StorePath,
    protocol::{BuildResult, Status},
};

use super::{building::failed, graph::Graph};

/// The builds that a client waits for.
pub(super) struct Plan<'a> {
    /// How many that it needs have not ended, for each that isn't ready yet.
    waiting: BTreeMap<&'a StorePath, usize>,
    ready: VecDeque<&'a StorePath>,
    /// Those that need one.
    dependents: BTreeMap<&'a StorePath, Vec<&'a StorePath>>,
    results: BTreeMap<&'a StorePath, BuildResult>,
    keep_going: bool,
    has_failed: bool,
}

impl<'a> Plan<'a> {
    /// Plans what makes the wanted outputs that are not valid. After a failure nothing is begun, unless `keep_going`.
    pub(super) fn new(
        graph: &'a Graph,
        wanted: &'a BTreeMap<&'a StorePath, BTreeSet<String>>,
        valid: &BTreeSet<StorePath>,
        keep_going: bool,
    ) -> Self {
        let mut waiting = BTreeMap::new();
        let mut left: Vec<_> = wanted.iter().map(|(path, names)| (*path, names)).collect();
        while let Some((path, names)) = left.pop() {
            let Some(vertex) = graph.0.get(path) else { continue };
            let is_there = |name: &String| vertex.path(name).is_some_and(|path| valid.contains(path));
            if !names.iter().all(is_there) && waiting.insert(path, 0).is_none() {
                left.extend(&vertex.inputs);
            }
        }
        let mut dependents: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for path in waiting.keys().copied().collect::<Vec<_>>() {
            for input in graph.0[path].inputs.keys().filter(|input| waiting.contains_key(input)).collect::<Vec<_>>() {
                dependents.entry(input).or_default().push(path);
                *waiting.entry(path).or_default() += 1;
            }
        }
        let ready: VecDeque<_> = waiting.extract_if(.., |_, needed| *needed == 0).map(|(path, _)| path).collect();
        Self { waiting, ready, dependents, results: BTreeMap::new(), keep_going, has_failed: false }
    }

    /// All that are to be built.
    pub(super) fn all(&self) -> impl Iterator<Item = &'a StorePath> {
        self.waiting.keys().chain(&self.ready).copied()
    }

    /// The next one to build, if one is ready.
    pub(super) fn next(&mut self) -> Option<&'a StorePath> {
        if self.has_failed && !self.keep_going { None } else { self.ready.pop_front() }
    }

    /// One has ended.
    pub(super) fn ended(&mut self, path: &'a StorePath, result: BuildResult) {
        let is_built = result.is_success();
        let message = format!("its dependency '{path}' failed: {}", result.message);
        self.results.insert(path, result);
        if !is_built {
            self.has_failed = true;
            self.fail_dependents(path, &message);
            return;
        }
        for dependent in self.dependents.remove(path).unwrap_or_default() {
            let Some(needed) = self.waiting.get_mut(dependent) else { continue };
            *needed -= 1;
            if *needed == 0 {
                self.waiting.remove(dependent);
                self.ready.push_back(dependent);
            }
        }
    }

    fn fail_dependents(&mut self, path: &'a StorePath, message: &str) {
        let mut left = vec![path];
        while let Some(path) = left.pop() {
            for dependent in self.dependents.remove(path).unwrap_or_default() {
                if self.waiting.remove(dependent).is_some() {
                    let text = format!("'{dependent}' can't be built: {message}");
                    self.results.insert(dependent, failed(Status::DependencyFailed, text));
                    left.push(dependent);
                }
            }
        }
    }

    /// How one ended; `None` if it was there.
    pub(super) fn result(&self, path: &StorePath) -> Option<BuildResult> {
        if let Some(result) = self.results.get(path) {
            return Some(result.clone());
        }
        let is_left = self.waiting.contains_key(path) || self.ready.contains(&path);
        is_left.then(|| {
            let text = format!("'{path}' was not built, since another build failed and --keep-going is not set");
            failed(Status::MiscFailure, text)
        })
    }
}

#[cfg(test)]
mod tests {
    use cofferdam_nix::{Hash, Modulo, Output};

    use super::{
        super::{building::ended, graph::Vertex},
        *,
    };

    fn path(name: &str) -> StorePath {
        StorePath::compute("text", &Hash::of(name.as_bytes()), name).unwrap()
    }

    fn outputs() -> BTreeSet<String> {
        BTreeSet::from(["out".to_owned()])
    }

    /// Derivations with the output `out`, and those that they need.
    fn graph(derivations: &[(&str, &[&str])]) -> Graph {
        let vertex = |(name, inputs): &(&str, &[&str])| {
            let hash = Hash::of(name.as_bytes());
            let vertex = Vertex {
                inputs: inputs.iter().map(|input| (path(input), outputs())).collect(),
                outputs: [("out".to_owned(), Output::InputAddressed(path(&format!("{name}-out"))))].into(),
                realised: BTreeMap::new(),
                modulo: Modulo { outputs: hash.clone(), input: hash, is_deferred: false },
            };
            (path(name), vertex)
        };
        Graph(derivations.iter().map(vertex).collect())
    }

    /// The names in the order in which they are built, when those of `failing` fail, and the status of each in `all`.
    fn built(graph: &Graph, valid: &[&str], failing: &[&str], keep_going: bool) -> (Vec<String>, Vec<Option<Status>>) {
        let top = path("top");
        let wanted = BTreeMap::from([(&top, outputs())]);
        let valid = valid.iter().map(|name| path(&format!("{name}-out"))).collect();
        let mut plan = Plan::new(graph, &wanted, &valid, keep_going);
        let mut order = Vec::new();
        while let Some(next) = plan.next() {
            order.push(next.name().to_owned());
            let status = if failing.contains(&next.name()) { Status::TimedOut } else { Status::Built };
            plan.ended(next, ended(status));
        }
        let names = ["base", "left", "right", "top"];
        (order, names.map(|name| plan.result(&path(name)).map(|result| result.status)).into())
    }

    const DIAMOND: [(&str, &[&str]); 4] =
        [("base", &[]), ("left", &["base"]), ("right", &["base"]), ("top", &["left", "right"])];

    #[test]
    fn all_that_is_missing_is_built_after_what_it_needs() {
        let graph = graph(&DIAMOND);
        let (order, statuses) = built(&graph, &[], &[], false);
        assert_eq!((&*order[0], &*order[3], order.len()), ("base", "top", 4));
        assert_eq!(statuses, [Some(Status::Built); 4]);
        assert_eq!(
            built(&graph, &["left", "right"], &[], false),
            (vec!["top".to_owned()], vec![None, None, None, Some(Status::Built)])
        );
        assert_eq!(built(&graph, &["top"], &[], false), (vec![], vec![None; 4]));
        // What is there again is not needed by what is there.
        let (order, _) = built(&graph, &["left"], &[], false);
        assert_eq!(order, ["base", "right", "top"]);
    }

    #[test]
    fn a_failure_fails_what_needs_it_and_stops_or_not() {
        let graph = graph(&DIAMOND);
        let (order, statuses) = built(&graph, &[], &["base"], true);
        assert_eq!(order, ["base"]);
        let failed = Some(Status::DependencyFailed);
        assert_eq!(statuses, [Some(Status::TimedOut), failed, failed, failed]);
        for (first, second) in [("left", "right"), ("right", "left")] {
            let (order, statuses) = built(&graph, &["base"], &[first], true);
            assert!(order.contains(&second.to_owned()) && !order.contains(&"top".to_owned()), "{order:?}");
            assert_eq!(statuses[3], failed);
        }
        let (order, statuses) = built(&graph, &["base"], &["left", "right"], false);
        assert_eq!(order.len(), 1);
        assert!(statuses.contains(&Some(Status::MiscFailure)), "{statuses:?}");
    }
}
