//! A derivation as a request.

use std::collections::{BTreeMap, BTreeSet};

use cofferdam_castore::{
    PathComponent,
    proto::{Entry, EntryExt as _},
};
use cofferdam_nix::{Algorithm, Attributes, Derivation, Graph, Hash, Method, Modulo, Output, Placeholders, StorePath};
use cofferdam_proto::snix::build::v1::{
    BuildRequest,
    build_request::{AdditionalFile, BuildConstraints, EnvVar},
};

use super::fetchurl;
use crate::{request::SYSTEM, store_paths::Known};

/// Where the build starts, and its temporary directory.
const BUILD_DIR: &str = "build";

/// The features that a derivation may require.
const FEATURES: [&str; 3] = ["kvm", "big-parallel", "benchmark"];

/// A derivation whose inputs' paths are known, and where its outputs are built.
pub(super) struct Prepared<'a> {
    pub(super) path: &'a StorePath,
    pub(super) derivation: &'a Derivation,
    pub(super) attributes: Attributes<'a>,
    /// Their names and declarations, by the paths where they are built.
    pub(super) outputs: BTreeMap<StorePath, (&'a str, &'a Output)>,
    pub(super) inputs: BTreeMap<StorePath, Known>,
    /// What stands for the outputs' paths, and the paths.
    placeholders: Placeholders,
}

impl<'a> Prepared<'a> {
    /// Checks the outputs of a derivation.
    ///
    /// # Errors
    ///
    /// What can't be built here.
    pub(super) fn new(path: &'a StorePath, derivation: &'a Derivation) -> Result<Self, String> {
        let Some(name) = path.name().strip_suffix(".drv") else {
            return Err(format!("the derivation must have a path that ends in .drv, not {path}"));
        };
        let attributes = Attributes::of(derivation)?;
        let (mut outputs, mut placeholders) = (BTreeMap::new(), Placeholders::default());
        for (output_name, output) in &derivation.outputs {
            let output_path = match output {
                Output::InputAddressed(path) => path.clone(),
                Output::Fixed { path, address } => {
                    let right = address.path(name, &BTreeSet::new(), false);
                    let right = right.map_err(|error| format!("the output {output_name} {error}"))?;
                    if *path != right {
                        return Err(format!("the output {output_name} must have the path {right}, not {path}"));
                    }
                    path.clone()
                }
                Output::Floating { method, algorithm } => {
                    check_function(output_name, *method, *algorithm)?;
                    path.scratch(output_name).map_err(|error| format!("the output {output_name}: {error}"))?
                }
                Output::Deferred => {
                    return Err(format!(
                        "the output {output_name} must have a path: it is to follow from inputs that are not known"
                    ));
                }
            };
            placeholders.own(output_name, &output_path);
            if let Some((other, _)) = outputs.insert(output_path, (output_name.as_str(), output)) {
                return Err(format!("two outputs must not have the same path, as {other} and {output_name} have"));
            }
        }
        let floating = outputs.values().filter(|(_, output)| matches!(output, Output::Floating { .. })).count();
        if floating != 0 && floating != outputs.len() {
            return Err(format!("all {} outputs must be floating or none, not {floating}", outputs.len()));
        }
        if outputs.is_empty() {
            return Err("the derivation must have outputs".to_owned());
        }
        Ok(Self { path, derivation, attributes, outputs, inputs: BTreeMap::new(), placeholders })
    }

    /// Whether an output's contents are known beforehand.
    pub(super) fn is_fixed(&self) -> bool {
        self.outputs.values().any(|(_, output)| matches!(output, Output::Fixed { .. }))
    }

    /// Whether the outputs' paths follow from their contents.
    fn is_floating(&self) -> bool {
        self.outputs.values().any(|(_, output)| matches!(output, Output::Floating { .. }))
    }

    /// What identifies the derivation, if its outputs are floating.
    pub(super) fn modulo(&self) -> Option<Modulo> {
        self.is_floating().then(|| self.derivation.modulo(|_| None)).flatten()
    }

    /// What an output may refer to: the inputs and all outputs. Their hash parts are the request's needles, in this order.
    pub(super) fn needles(&self) -> Vec<&StorePath> {
        self.inputs.keys().chain(self.outputs.keys()).collect()
    }

    /// The request.
    ///
    /// # Errors
    ///
    /// What can't be built here.
    pub(super) fn request(&self, cpus: u32, impure_env: &BTreeMap<String, String>) -> Result<BuildRequest, String> {
        let available_ro_paths = self.ro_paths()?;
        let (environment_vars, additional_files) = self.environment(cpus, impure_env)?;
        let (system, command_args) = self.command()?;
        let input = |(path, known): (&StorePath, &Known)| {
            let name = PathComponent::try_from(path.base_name().as_bytes()).map_err(|error| error.to_string())?;
            Ok(Entry::named(name, known.node.clone()))
        };
        Ok(BuildRequest {
            inputs: self.inputs.iter().map(input).collect::<Result<_, String>>()?,
            command_args,
            working_dir: BUILD_DIR.to_owned(),
            scratch_paths: vec![BUILD_DIR.to_owned(), "nix/store".to_owned()],
            inputs_dir: "nix/store".to_owned(),
            outputs: self.outputs.keys().map(|path| format!("nix/store/{}", path.base_name())).collect(),
            environment_vars,
            constraints: Some(BuildConstraints {
                system,
                min_memory: 0,
                available_ro_paths,
                network_access: self.is_fixed(),
                provide_bin_sh: true,
            }),
            additional_files,
            refscan_needles: self.needles().iter().map(|path| path.hash_part().to_owned()).collect(),
        })
    }

    /// The system that the command is for, and the command.
    fn command(&self) -> Result<(String, Vec<String>), String> {
        let Derivation { builder, arguments, platform, .. } = self.derivation;
        if builder.starts_with("builtin:") {
            return Ok((SYSTEM.to_owned(), fetchurl::command(self)?));
        }
        let argument = |text: &String| self.placeholders.replaced_text(text);
        Ok((platform.clone(), [builder.clone()].into_iter().chain(arguments.iter().map(argument)).collect()))
    }

    /// What the derivation requires of the system.
    fn ro_paths(&self) -> Result<Vec<String>, String> {
        if self.attributes.flag("__noChroot") {
            return Err("__noChroot must not be set: every build is sealed off here".to_owned());
        }
        let required = self.attributes.words("requiredSystemFeatures")?.unwrap_or_default();
        if let Some(unknown) = required.iter().find(|feature| !FEATURES.contains(&feature.as_str())) {
            let known = FEATURES.join(", ");
            return Err(format!("requiredSystemFeatures must be some of {known}, and {unknown:?} is not"));
        }
        Ok(required.iter().any(|feature| feature == "kvm").then(|| "/dev/kvm".to_owned()).into_iter().collect())
    }

    /// The inputs, for what is told of their closures.
    fn graph(&self) -> Graph<'_> {
        Graph(self.inputs.iter().map(|(path, known)| (path, &known.info)).collect())
    }

    /// The command's variables, and the files of its attributes.
    fn environment(
        &self,
        cpus: u32,
        impure_env: &BTreeMap<String, String>,
    ) -> Result<(Vec<EnvVar>, Vec<AdditionalFile>), String> {
        let mut files = BTreeMap::new();
        let mut vars: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut set = |key: &str, value: &str| drop(vars.insert(key.to_owned(), value.into()));
        set("PATH", "/path-not-set");
        set("HOME", "/homeless-shelter");
        set("NIX_STORE", "/nix/store");
        set("NIX_BUILD_CORES", &cpus.to_string());
        if self.attributes.are_structured() {
            self.structured(&mut vars, &mut files)?;
        } else {
            self.plain(&mut vars, &mut files)?;
        }
        let mut set = |key: &str, value: &str| drop(vars.insert(key.to_owned(), value.into()));
        for key in ["NIX_BUILD_TOP", "TMPDIR", "TEMPDIR", "TMP", "TEMP", "PWD"] {
            set(key, "/build");
        }
        if self.is_fixed() {
            set("NIX_OUTPUT_CHECKED", "1");
            for name in self.attributes.words("impureEnvVars")?.unwrap_or_default() {
                set(&name, impure_env.get(&name).map_or("", String::as_str));
            }
        }
        set("NIX_LOG_FD", "2");
        set("TERM", "xterm-256color");
        let vars = vars.into_iter().map(|(key, value)| EnvVar { key, value: value.into() });
        let file = |(name, contents): (String, Vec<u8>)| AdditionalFile {
            path: format!("{BUILD_DIR}/{name}"),
            contents: contents.into(),
        };
        Ok((vars.collect(), files.into_iter().map(file).collect()))
    }

    /// Attributes as variables, and as files where `passAsFile` says so.
    fn plain(&self, vars: &mut BTreeMap<String, Vec<u8>>, files: &mut BTreeMap<String, Vec<u8>>) -> Result<(), String> {
        let as_files = self.attributes.words("passAsFile")?.unwrap_or_default();
        let as_files: BTreeSet<_> = as_files.into_iter().collect();
        for (key, value) in &self.derivation.environment {
            if !as_files.contains(key) {
                vars.insert(key.clone(), self.placeholders.replaced(value));
                continue;
            }
            let name = format!(".attr-{}", Hash::of(key.as_bytes()).base32());
            vars.insert(format!("{key}Path"), format!("/{BUILD_DIR}/{name}").into());
            files.insert(name, self.placeholders.replaced(value));
        }
        let graph = self.graph();
        for (name, paths) in self.attributes.graphs()? {
            self.check_exported(&paths)?;
            files.insert(name, graph.registration(&paths).into());
        }
        Ok(())
    }

    /// Attributes as files of JSON and of a shell's declarations.
    fn structured(
        &self,
        vars: &mut BTreeMap<String, Vec<u8>>,
        files: &mut BTreeMap<String, Vec<u8>>,
    ) -> Result<(), String> {
        let mut graphs = Vec::new();
        let graph = self.graph();
        for (name, paths) in self.attributes.graphs()? {
            self.check_exported(&paths)?;
            graphs.push((name, graph.json(&paths)?));
        }
        let Some(written) = self.attributes.files(graphs) else { return Ok(()) };
        for (variable, name, contents) in
            [("NIX_ATTRS_JSON_FILE", ".attrs.json", written.json), ("NIX_ATTRS_SH_FILE", ".attrs.sh", written.shell)]
        {
            vars.insert(variable.to_owned(), format!("/{BUILD_DIR}/{name}").into());
            files.insert(name.to_owned(), self.placeholders.replaced(&contents));
        }
        Ok(())
    }

    fn check_exported(&self, paths: &[StorePath]) -> Result<(), String> {
        match paths.iter().find(|path| !self.inputs.contains_key(path)) {
            Some(path) => Err(format!(
                "cannot export references of path '{path}' because it is not in the input closure of the derivation"
            )),
            None => Ok(()),
        }
    }
}

/// Refuses hashes that can't be computed here.
fn check_function(output: &str, method: Method, algorithm: Algorithm) -> Result<(), String> {
    match (method, algorithm) {
        (_, Algorithm::Md5) => Err(format!("the output {output} must have another hash function than md5")),
        (Method::Text, other) if other != Algorithm::Sha256 => {
            Err(format!("the output {output} must have the hash function sha256 for a text, not {}", other.name()))
        }
        _ => Ok(()),
    }
}
