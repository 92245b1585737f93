//! A derivation as a request.

use std::collections::{BTreeMap, BTreeSet};

use cofferdam_castore::{
    PathComponent,
    proto::{Entry, EntryExt as _},
};
use cofferdam_nix::{Derivation, Hash, Output, StorePath};
use cofferdam_proto::snix::build::v1::{
    BuildRequest,
    build_request::{AdditionalFile, BuildConstraints, EnvVar},
};

use crate::store_paths::Known;

/// Where the build starts, and its temporary directory.
const BUILD_DIR: &str = "build";

/// The features that a derivation may require.
const FEATURES: [&str; 3] = ["kvm", "big-parallel", "benchmark"];

/// A derivation whose outputs' paths are known, and its name.
pub(super) struct Prepared<'a> {
    pub(super) path: &'a StorePath,
    pub(super) derivation: &'a Derivation,
    /// By their paths.
    pub(super) outputs: BTreeMap<&'a StorePath, &'a Output>,
    pub(super) inputs: BTreeMap<StorePath, Known>,
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
        let mut outputs = BTreeMap::new();
        for (output_name, output) in &derivation.outputs {
            let output_path = match output {
                Output::InputAddressed(path) => path,
                Output::Fixed { path, address } => {
                    let right = address.path(name, &BTreeSet::new(), false);
                    let right = right.map_err(|error| format!("the output {output_name} {error}"))?;
                    if *path != right {
                        return Err(format!("the output {output_name} must have the path {right}, not {path}"));
                    }
                    path
                }
                Output::Floating { .. } | Output::Deferred => {
                    return Err(format!(
                        "the output {output_name} must have a path: floating outputs are not built here"
                    ));
                }
            };
            if outputs.insert(output_path, output).is_some() {
                return Err(format!("two outputs must not have the path {output_path}"));
            }
        }
        if outputs.is_empty() {
            return Err("the derivation must have outputs".to_owned());
        }
        Ok(Self { path, derivation, outputs, inputs: BTreeMap::new() })
    }

    /// Whether an output's contents are known beforehand.
    pub(super) fn is_fixed(&self) -> bool {
        self.outputs.values().any(|output| matches!(output, Output::Fixed { .. }))
    }

    /// What an output may refer to: the inputs and all outputs. Their hash parts are the request's needles, in this order.
    pub(super) fn needles(&self) -> Vec<&StorePath> {
        self.inputs.keys().chain(self.outputs.keys().copied()).collect()
    }

    /// The request.
    ///
    /// # Errors
    ///
    /// What can't be built here.
    pub(super) fn request(&self, cpus: u32) -> Result<BuildRequest, String> {
        let Derivation { builder, arguments, platform, .. } = self.derivation;
        let available_ro_paths = self.ro_paths()?;
        let (environment_vars, additional_files) = self.environment(cpus)?;
        let input = |(path, known): (&StorePath, &Known)| {
            let name = PathComponent::try_from(path.base_name().as_bytes()).map_err(|error| error.to_string())?;
            Ok(Entry::named(name, known.node.clone()))
        };
        Ok(BuildRequest {
            inputs: self.inputs.iter().map(input).collect::<Result<_, String>>()?,
            command_args: [builder].into_iter().chain(arguments).cloned().collect(),
            working_dir: BUILD_DIR.to_owned(),
            scratch_paths: vec![BUILD_DIR.to_owned(), "nix/store".to_owned()],
            inputs_dir: "nix/store".to_owned(),
            outputs: self.outputs.keys().map(|path| format!("nix/store/{}", path.base_name())).collect(),
            environment_vars,
            constraints: Some(BuildConstraints {
                system: platform.clone(),
                min_memory: 0,
                available_ro_paths,
                network_access: self.is_fixed(),
                provide_bin_sh: true,
            }),
            additional_files,
            refscan_needles: self.needles().iter().map(|path| path.hash_part().to_owned()).collect(),
        })
    }

    /// What the derivation requires of the system.
    fn ro_paths(&self) -> Result<Vec<String>, String> {
        if self.derivation.environment.get("__noChroot").is_some_and(|value| value == b"1") {
            return Err("__noChroot must not be set: every build is sealed off here".to_owned());
        }
        let required = self.derivation.attribute("requiredSystemFeatures").unwrap_or_default();
        let required: Vec<_> = required.split_ascii_whitespace().collect();
        if let Some(unknown) = required.iter().find(|feature| !FEATURES.contains(feature)) {
            let known = FEATURES.join(", ");
            return Err(format!("requiredSystemFeatures must be some of {known}, and {unknown:?} is not"));
        }
        Ok(required.contains(&"kvm").then(|| "/dev/kvm".to_owned()).into_iter().collect())
    }

    /// The command's variables, and the files of attributes that are passed as files.
    fn environment(&self, cpus: u32) -> Result<(Vec<EnvVar>, Vec<AdditionalFile>), String> {
        let own = &self.derivation.environment;
        if own.contains_key("__json") {
            return Err("structured attributes are not supported here yet".to_owned());
        }
        let mut vars: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut set = |key: &str, value: &str| drop(vars.insert(key.to_owned(), value.into()));
        set("PATH", "/path-not-set");
        set("HOME", "/homeless-shelter");
        set("NIX_STORE", "/nix/store");
        set("NIX_BUILD_CORES", &cpus.to_string());
        let as_files: BTreeSet<_> =
            self.derivation.attribute("passAsFile").unwrap_or_default().split_ascii_whitespace().collect();
        let mut files = Vec::new();
        for (key, value) in own {
            if !as_files.contains(key.as_str()) {
                vars.insert(key.clone(), value.clone());
                continue;
            }
            let path = format!("{BUILD_DIR}/.attr-{}", Hash::of(key.as_bytes()).base32());
            vars.insert(format!("{key}Path"), format!("/{path}").into());
            files.push(AdditionalFile { path, contents: value.clone().into() });
        }
        let mut set = |key: &str, value: &str| drop(vars.insert(key.to_owned(), value.into()));
        for key in ["NIX_BUILD_TOP", "TMPDIR", "TEMPDIR", "TMP", "TEMP", "PWD"] {
            set(key, "/build");
        }
        if self.is_fixed() {
            set("NIX_OUTPUT_CHECKED", "1");
        }
        set("NIX_LOG_FD", "2");
        set("TERM", "xterm-256color");
        let vars = vars.into_iter().map(|(key, value)| EnvVar { key, value: value.into() });
        Ok((vars.collect(), files))
    }
}
