//! The derivations that a client wants built and all that they need, as it has uploaded them.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use cofferdam_castore::{Node, archive::read_blob};
use cofferdam_nix::{Derivation, DerivedPath, Modulo, Output, OutputNames, Realisation, StorePath};

use super::session::{Stop, Tenant};
use crate::store_paths::Known;

/// How large the graph of one request may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Derivations, with all that they need.
    pub(super) derivations: usize,
    /// Derivations of which each needs the next one.
    pub(super) depth: usize,
    /// Bytes of their texts, together.
    pub(super) text_bytes: u64,
}

/// The limits of every request.
pub(super) const LIMITS: Limits = Limits { derivations: 20_000, depth: 1000, text_bytes: 64 * 1024 * 1024 };

/// Derivations, by their paths. Each is there with all that it needs.
#[derive(Debug, Default)]
pub(super) struct Graph(pub(super) BTreeMap<StorePath, Vertex>);

/// A derivation without its text.
#[derive(Debug)]
pub(super) struct Vertex {
    /// The derivations that it needs, and which of their outputs.
    pub(super) inputs: BTreeMap<StorePath, BTreeSet<String>>,
    pub(super) outputs: BTreeMap<String, Output>,
    /// The paths of outputs whose paths don't follow from the derivation, if they had any when the graph was loaded.
    pub(super) realised: BTreeMap<String, StorePath>,
    pub(super) modulo: Modulo,
}

/// A derivation whose inputs are not all in the graph yet.
struct Open {
    path: StorePath,
    derivation: Derivation,
    left: Vec<StorePath>,
}

impl Graph {
    /// Reads derivations, and all that they need.
    ///
    /// # Errors
    ///
    /// One is missing or broken, or there are too many of them.
    pub(super) fn load(tenant: &Tenant, targets: &BTreeSet<StorePath>, limits: Limits) -> Result<Self, Stop> {
        let known = tenant.closure(targets)?;
        let mut loading = Loading { tenant, limits, known, graph: Self::default(), open: Vec::new(), bytes: 0 };
        for target in targets {
            loading.visit(target)?;
            loading.close_all()?;
        }
        Ok(loading.graph)
    }

    /// The names of the outputs that a client wants, for each derivation.
    ///
    /// # Errors
    ///
    /// A derivation has no such output.
    pub(super) fn wanted(&self, targets: &[DerivedPath]) -> Result<BTreeMap<&StorePath, BTreeSet<String>>, Stop> {
        let mut wanted: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
        for target in targets {
            let DerivedPath::Built { derivation, outputs } = target else { continue };
            let Some((path, vertex)) = self.0.get_key_value(derivation) else { continue };
            let names = match outputs {
                OutputNames::All => vertex.outputs.keys().cloned().collect(),
                OutputNames::These(names) => names.clone(),
            };
            vertex.check_names(path, &names)?;
            wanted.entry(path).or_default().extend(names);
        }
        Ok(wanted)
    }

    /// All outputs' paths that are known.
    pub(super) fn output_paths(&self) -> BTreeSet<StorePath> {
        let paths =
            |vertex: &Vertex| vertex.outputs.keys().filter_map(|name| vertex.path(name).cloned()).collect::<Vec<_>>();
        self.0.values().flat_map(paths).collect()
    }

    /// A derivation with the paths of its inputs instead of the derivations that make them, and its path. That is another one if
    /// its outputs depend on it.
    ///
    /// # Errors
    ///
    /// It can't be read again, or such a path isn't known.
    pub(super) fn resolved(&self, tenant: &Tenant, path: &StorePath) -> Result<(StorePath, Derivation), Stop> {
        let refused = |why: &dyn std::fmt::Display| Stop::Refused(format!("derivation '{path}': {why}"));
        let derivation = parse(tenant, path, &tenant.require(path)?)?;
        let mut paths = BTreeMap::new();
        for (input, names) in &derivation.input_derivations {
            let Some(vertex) = self.0.get(input) else { continue };
            for name in names {
                if let Some(realisation) = vertex.realisation(tenant, name)? {
                    paths.insert((input.clone(), name.clone()), realisation.path);
                }
            }
        }
        let path_of = |input: &StorePath, name: &str| paths.get(&(input.clone(), name.to_owned())).cloned();
        let name = path.name().strip_suffix(".drv").unwrap_or_default();
        let is_unresolved = derivation.is_unresolved();
        let resolved = derivation.resolved(name, path_of).map_err(|rule| refused(&rule))?;
        let path = if is_unresolved { resolved.path(name).map_err(|error| refused(&error))? } else { path.clone() };
        Ok((path, resolved))
    }
}

impl Vertex {
    /// The path of an output, as far as it was known when the graph was loaded.
    pub(super) fn path(&self, name: &str) -> Option<&StorePath> {
        self.outputs.get(name).and_then(Output::path).or_else(|| self.realised.get(name))
    }

    /// What an output has become, or will.
    pub(super) fn realisation(&self, tenant: &Tenant, name: &str) -> Result<Option<Realisation>, Stop> {
        let id = self.modulo.output_id(name);
        match self.outputs.get(name).map(Output::path) {
            Some(Some(path)) => Ok(Some(Realisation::new(id, path.clone()))),
            Some(None) => tenant.realisation(&id),
            None => Ok(None),
        }
    }

    fn check_names(&self, path: &StorePath, names: &BTreeSet<String>) -> Result<(), Stop> {
        match names.iter().find(|name| !self.outputs.contains_key(*name)) {
            Some(name) => Err(Stop::Refused(format!("derivation '{path}' has no output '{name}'"))),
            None => Ok(()),
        }
    }
}

struct Loading<'a> {
    tenant: &'a Tenant,
    limits: Limits,
    known: BTreeMap<StorePath, Known>,
    graph: Graph,
    /// Each needs the next one.
    open: Vec<Open>,
    bytes: u64,
}

impl Loading<'_> {
    /// Opens a derivation, unless it is in the graph.
    fn visit(&mut self, path: &StorePath) -> Result<(), Stop> {
        if self.graph.0.contains_key(path) {
            return Ok(());
        }
        let refused = |rule: String| Err(Stop::Refused(rule));
        if self.open.iter().any(|open| open.path == *path) {
            return refused(format!("derivation '{path}' must not need itself"));
        }
        let limits = self.limits;
        let (count, depth) = (self.graph.0.len() + self.open.len() + 1, self.open.len() + 1);
        if count > limits.derivations {
            let most = limits.derivations;
            return refused(format!("there must be at most {most} derivations, and '{path}' is one more"));
        }
        if depth > limits.depth {
            let most = limits.depth;
            return refused(format!("a chain must have at most {most} derivations, and '{path}' is one more"));
        }
        let Some(known) = self.known.get(path) else {
            return refused(format!("derivation '{path}' is not valid here"));
        };
        if let Node::File { size, .. } = known.node {
            self.bytes += size;
        }
        if self.bytes > limits.text_bytes {
            let (most, bytes) = (limits.text_bytes, self.bytes);
            return refused(format!("the derivations must have at most {most} bytes, not {bytes} with '{path}'"));
        }
        let derivation = parse(self.tenant, path, known)?;
        let left = derivation.input_derivations.keys().cloned().collect();
        self.open.push(Open { path: path.clone(), derivation, left });
        Ok(())
    }

    /// Takes what is open into the graph, inputs first.
    fn close_all(&mut self) -> Result<(), Stop> {
        while let Some(open) = self.open.last_mut() {
            if let Some(input) = open.left.pop() {
                self.visit(&input)?;
                continue;
            }
            let Some(Open { path, derivation, .. }) = self.open.pop() else { return Ok(()) };
            let vertex = self.vertex(&path, derivation)?;
            self.graph.0.insert(path, vertex);
        }
        Ok(())
    }

    /// A derivation whose inputs are in the graph. Its outputs must have the paths that follow from it.
    fn vertex(&self, path: &StorePath, derivation: Derivation) -> Result<Vertex, Stop> {
        let vertices = &self.graph.0;
        let Some(modulo) = derivation.modulo(|input| Some(&vertices.get(input)?.modulo)) else {
            return Err(Stop::Refused(format!("derivation '{path}' needs one that is not there")));
        };
        for (input, names) in &derivation.input_derivations {
            vertices[input].check_names(input, names)?;
        }
        let name = path.name().trim_end_matches(".drv");
        for (output_name, output) in &derivation.outputs {
            let Output::InputAddressed(found) = output else { continue };
            let right = modulo.output_path(name, output_name);
            let right =
                right.map_err(|error| Stop::Refused(format!("the output {output_name} of '{path}': {error}")))?;
            if *found != right {
                return Err(Stop::Refused(format!(
                    "the output {output_name} of derivation '{path}' must have the path '{right}', not '{found}'"
                )));
            }
        }
        let Tenant { client, nix, .. } = self.tenant;
        let mut realised = BTreeMap::new();
        for (name, _) in derivation.outputs.iter().filter(|(_, output)| output.path().is_none()) {
            let realisation = nix.paths.realisation(client, &modulo.output_id(name))?;
            realised.extend(realisation.map(|realisation| (name.clone(), realisation.path)));
        }
        Ok(Vertex { inputs: derivation.input_derivations, outputs: derivation.outputs, realised, modulo })
    }
}

/// Reads a derivation from the store.
pub(super) fn parse(tenant: &Tenant, path: &StorePath, known: &Known) -> Result<Derivation, Stop> {
    let refused = |rule: &str| Stop::Refused(format!("derivation '{path}' {rule}"));
    if !path.is_derivation() {
        return Err(refused("must have a path that ends in .drv"));
    }
    let Node::File { digest, size, .. } = &known.node else { return Err(refused("must be a file")) };
    if *size > LIMITS.text_bytes {
        return Err(refused(&format!("must have at most {} bytes, not {size}", LIMITS.text_bytes)));
    }
    let mut text = Vec::new();
    let read = read_blob(&tenant.store(), digest, *size, Path::new(path.base_name()), &|| false, &mut |bytes| {
        text.extend_from_slice(bytes);
        Ok(())
    });
    read.map_err(|error| Stop::failed(&error))?;
    Derivation::parse(&text).map_err(|error| refused(&format!("can't be read: {error}")))
}
