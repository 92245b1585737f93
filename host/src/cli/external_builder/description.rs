//! What Nix says of a build: a file of JSON, and the files in the directory that it names.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Read as _,
    path::{Component, Path, PathBuf},
};

use cofferdam_nix::{STORE_DIR, StorePath};
use cofferdam_proto::snix::build::v1::{
    BuildRequest,
    build_request::{AdditionalFile, BuildConstraints, EnvVar},
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{
    cli::CliError,
    request::{MAX_ADDITIONAL_FILES, MAX_ENCODED_BYTES, MAX_INPUTS, MAX_OUTPUTS, SYSTEM},
};

/// The only version of the file that is known.
const VERSION: u64 = 1;

/// Most characters of a value in an error.
const SHOWN_CHARS: usize = 80;

/// A valid description of a build.
#[derive(Debug)]
pub(super) struct Description {
    command: Vec<String>,
    environment: BTreeMap<String, String>,
    /// The closure of the inputs.
    pub(super) inputs: BTreeSet<StorePath>,
    /// What the build must make.
    pub(super) outputs: BTreeSet<StorePath>,
    real_store: PathBuf,
    /// Where Nix has put files for the build.
    files: PathBuf,
    /// Where the build finds them, without the slash before it.
    work_dir: String,
}

impl Description {
    /// Reads the file.
    ///
    /// # Errors
    ///
    /// It can't be read, or breaks a rule.
    pub(super) fn read(file: &Path) -> Result<Self, CliError> {
        let read = || {
            let mut bytes = Vec::new();
            File::open(file)?.take(MAX_ENCODED_BYTES as u64 + 1).read_to_end(&mut bytes).map(|_| bytes)
        };
        let bytes = read().map_err(|error| CliError::at_path(format!("can't read {file:?}"), error))?;
        if bytes.len() > MAX_ENCODED_BYTES {
            return Err(CliError::wrong(format!("{file:?} must not be larger than {MAX_ENCODED_BYTES} bytes")));
        }
        Self::parse(&bytes).map_err(|rule| CliError::wrong(format!("{file:?} is no description of a build: {rule}")))
    }

    /// The field, the rule and the value of what is wrong.
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let object = serde_json::from_slice::<Map<String, Value>>(bytes);
        let fields = Fields(object.map_err(|error| format!("it must be an object of JSON: {error}"))?);
        fields.is("version", &VERSION.into())?;
        fields.is("system", &SYSTEM.into())?;
        fields.is("storeDir", &STORE_DIR.into())?;
        let real_store = fields.path("realStoreDir")?;
        let top = fields.path("topTmpDir")?;
        let files = fields.path("tmpDir")?;
        if !files.starts_with(&top) {
            return Err(wrong("tmpDir", "must be within topTmpDir", &files.to_string_lossy()));
        }
        let work_dir = fields.path("tmpDirInSandbox")?;
        let work_dir = work_dir.to_string_lossy().trim_start_matches('/').to_owned();

        let outputs: BTreeMap<String, String> = fields.get("outputs", "a map of names to store paths")?;
        let (named, outputs) = (outputs.len(), store_paths("outputs", MAX_OUTPUTS, outputs)?);
        if named == 0 || outputs.len() != named {
            return Err(wrong("outputs", "must name at least one path, and each path once", &named.to_string()));
        }
        let inputs: Vec<String> = fields.get("inputPaths", "a list of store paths")?;
        let inputs = inputs.into_iter().enumerate().map(|(at, path)| (at.to_string(), path));
        let inputs = store_paths("inputPaths", MAX_INPUTS, inputs)?;
        if let Some(both) = inputs.intersection(&outputs).next() {
            return Err(wrong("outputs", "must not be among inputPaths", &both.to_string()));
        }
        Ok(Self {
            command: fields.command()?,
            environment: fields.environment()?,
            inputs,
            outputs,
            real_store,
            files,
            work_dir,
        })
    }

    /// Where a store path is on this host.
    pub(super) fn real_path(&self, path: &StorePath) -> PathBuf {
        self.real_store.join(path.base_name())
    }

    /// The request, without its inputs. Its outputs have the order of [`Description::outputs`].
    ///
    /// # Errors
    ///
    /// Nix's files can't be read, or are too many.
    pub(super) fn request(&self, has_network: bool) -> Result<BuildRequest, CliError> {
        let store = STORE_DIR.trim_start_matches('/');
        let vars = self.environment.iter();
        let vars = vars.map(|(key, value)| EnvVar { key: key.clone(), value: value.clone().into() });
        // Nix sets it itself, and for these only.
        let is_fixed = self.environment.get("NIX_OUTPUT_CHECKED").is_some_and(|value| value == "1");
        let mut scratch_paths = vec![self.work_dir.clone(), store.to_owned()];
        scratch_paths.sort();
        Ok(BuildRequest {
            inputs: vec![],
            command_args: self.command.clone(),
            working_dir: self.work_dir.clone(),
            scratch_paths,
            inputs_dir: store.to_owned(),
            outputs: self.outputs.iter().map(|path| format!("{store}/{}", path.base_name())).collect(),
            environment_vars: vars.collect(),
            constraints: Some(BuildConstraints {
                system: SYSTEM.to_owned(),
                min_memory: 0,
                available_ro_paths: vec![],
                network_access: is_fixed && has_network,
                provide_bin_sh: true,
            }),
            additional_files: self.additional_files()?,
            // Nix scans outputs itself.
            refscan_needles: vec![],
        })
    }

    /// What Nix has put into the build's directory: attributes and graphs.
    fn additional_files(&self) -> Result<Vec<AdditionalFile>, CliError> {
        let failed = |error| CliError::at_path(format!("can't read tmpDir {:?}", self.files), error);
        let (mut files, mut left) = (Vec::new(), MAX_ENCODED_BYTES as u64);
        for entry in fs::read_dir(&self.files).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let (name, path) = (entry.file_name(), entry.path());
            let is_file = entry.file_type().map_err(failed)?.is_file();
            let (Some(name), true) = (name.to_str(), is_file) else {
                return Err(CliError::wrong(format!("tmpDir must have files with names in UTF-8 only, not {path:?}")));
            };
            let mut contents = Vec::new();
            let read = File::open(&path).and_then(|file| file.take(left).read_to_end(&mut contents));
            left -= read.map_err(failed)? as u64;
            if left == 0 || files.len() == MAX_ADDITIONAL_FILES {
                return Err(CliError::wrong(format!(
                    "tmpDir {:?} must have less than {MAX_ENCODED_BYTES} bytes in at most {MAX_ADDITIONAL_FILES} files",
                    self.files
                )));
            }
            files.push(AdditionalFile { path: format!("{}/{name}", self.work_dir), contents: contents.into() });
        }
        files.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(files)
    }
}

/// The fields of the file. Those that aren't known are left alone, as they are in other versions of Nix.
struct Fields(Map<String, Value>);

impl Fields {
    fn get<T: DeserializeOwned>(&self, field: &str, what: &str) -> Result<T, String> {
        let value = self.0.get(field).ok_or_else(|| format!("{field} must be {what}, and is missing"))?;
        serde_json::from_value(value.clone()).map_err(|_| wrong(field, &format!("must be {what}"), &value.to_string()))
    }

    fn is(&self, field: &str, only: &Value) -> Result<(), String> {
        match self.get::<Value>(field, &only.to_string())? {
            value if value == *only => Ok(()),
            value => Err(wrong(field, &format!("must be {only}"), &value.to_string())),
        }
    }

    /// An absolute path that is not the root.
    fn path(&self, field: &str) -> Result<PathBuf, String> {
        let text: String = self.get(field, "a path")?;
        let path = PathBuf::from(&text);
        let mut parts = path.components();
        let is_absolute = parts.next() == Some(Component::RootDir) && !text.contains('\0');
        let mut parts = parts.peekable();
        if !is_absolute || parts.peek().is_none() || !parts.all(|part| matches!(part, Component::Normal(_))) {
            return Err(wrong(field, "must be an absolute path without `..`, and not the root", &text));
        }
        Ok(path)
    }

    /// The builder and its arguments.
    fn command(&self) -> Result<Vec<String>, String> {
        let builder: String = self.get("builder", "the path of a program")?;
        if builder.starts_with("builtin:") {
            let rule = "must be a program: what is built into Nix runs there, with the system \"builtin\"";
            return Err(wrong("builder", rule, &builder));
        }
        if builder.is_empty() || builder.contains('\0') {
            return Err(wrong("builder", "must be the path of a program", &builder));
        }
        let args: Vec<String> = self.get("args", "a list of strings")?;
        if let Some((at, arg)) = args.iter().enumerate().find(|(_, arg)| arg.contains('\0')) {
            return Err(wrong(&format!("args[{at}]"), "must not have a NUL", arg));
        }
        Ok([vec![builder], args].concat())
    }

    fn environment(&self) -> Result<BTreeMap<String, String>, String> {
        let vars: BTreeMap<String, String> = self.get("env", "a map of strings to strings")?;
        for (key, value) in &vars {
            if key.is_empty() || key.contains(['=', '\0']) {
                return Err(wrong("env", "must have names that are not empty, without `=` and NUL", key));
            }
            if value.contains('\0') {
                return Err(wrong(&format!("env.{key}"), "must not have a NUL", value));
            }
        }
        Ok(vars)
    }
}

fn store_paths(
    field: &str,
    most: usize,
    paths: impl IntoIterator<Item = (String, String)>,
) -> Result<BTreeSet<StorePath>, String> {
    let mut parsed = BTreeSet::new();
    for (at, path) in paths {
        parsed.insert(StorePath::parse(&path).map_err(|error| format!("{field}[{at}] {error}"))?);
        if parsed.len() > most {
            return Err(format!("{field} must not have more than {most} paths"));
        }
    }
    Ok(parsed)
}

fn wrong(field: &str, rule: &str, value: &str) -> String {
    let mut shown: String = value.chars().take(SHOWN_CHARS).collect();
    if shown.len() < value.len() {
        shown.push('…');
    }
    format!("{field} {rule}, not {shown:?}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const INPUT: &str = "/nix/store/myzl7fy9jx5srkflx0vcjflgaqpccm1f-input";
    const OUTPUT: &str = "/nix/store/lizamdjm8qqy2cc1wmsfwbvwgf8wwvfb-first";

    /// As Nix 2.34 writes it.
    fn description(files: &Path) -> Value {
        json!({
            "args": ["-c", "echo hi > $out"],
            "builder": "/bin/sh",
            "env": { "NIX_OUTPUT_CHECKED": "1", "out": OUTPUT },
            "inputPaths": [INPUT],
            "outputs": { "out": OUTPUT },
            "realStoreDir": "/real/store",
            "storeDir": "/nix/store",
            "system": "x86_64-linux",
            "tmpDir": files.join("build"),
            "tmpDirInSandbox": "/build",
            "topTmpDir": files,
            "version": 1,
        })
    }

    fn parse(value: &Value) -> Result<Description, String> {
        Description::parse(value.to_string().as_bytes())
    }

    #[test]
    fn a_description_becomes_a_request_with_nixs_files() {
        let dir = tempfile::tempdir().unwrap();
        let tmp = dir.path().join("build");
        fs::create_dir(&tmp).unwrap();
        fs::write(tmp.join(".attrs.json"), "{}").unwrap();
        let description = parse(&description(dir.path())).unwrap();
        let request = description.request(true).unwrap();
        assert_eq!(request.command_args, ["/bin/sh", "-c", "echo hi > $out"]);
        assert_eq!(request.outputs, [&OUTPUT[1..]]);
        assert_eq!(&*request.additional_files[0].path, "build/.attrs.json");
        assert_eq!(&*request.additional_files[0].contents, b"{}");
        assert!(request.constraints.clone().unwrap().network_access);
        crate::request::BuildRequest::try_from(request).unwrap();
        assert!(!description.request(false).unwrap().constraints.unwrap().network_access);
        let real = description.real_path(description.inputs.first().unwrap());
        assert_eq!(real, Path::new("/real/store/myzl7fy9jx5srkflx0vcjflgaqpccm1f-input"));

        std::os::unix::fs::symlink("/etc/shadow", tmp.join("link")).unwrap();
        let error = description.request(true).unwrap_err().to_string();
        assert!(error.contains("tmpDir must have files") && error.contains("link"), "{error}");
    }

    #[test]
    fn every_field_has_its_rule() {
        let right = description(Path::new("/tmp/nix"));
        parse(&right).unwrap();
        for (field, value, says) in [
            ("version", json!(2), "version must be 1, not \"2\""),
            ("system", json!("aarch64-linux"), "system must be \"x86_64-linux\", not \"\\\"aarch64-linux"),
            ("storeDir", json!("/gnu/store"), "storeDir must be \"/nix/store\""),
            ("realStoreDir", json!("store"), "realStoreDir must be an absolute path"),
            ("realStoreDir", json!("/"), "realStoreDir must be an absolute path"),
            ("topTmpDir", json!("/a/../b"), "topTmpDir must be an absolute path without `..`"),
            ("tmpDir", json!("/etc"), "tmpDir must be within topTmpDir, not \"/etc\""),
            ("tmpDirInSandbox", json!("/a\0"), "tmpDirInSandbox must be an absolute path"),
            ("builder", json!("builtin:fetchurl"), "builder must be a program: what is built into Nix"),
            ("builder", json!(""), "builder must be the path of a program"),
            ("args", json!("-c"), "args must be a list of strings, not \"\\\"-c"),
            ("args", json!(["-c", "a\0"]), "args[1] must not have a NUL, not \"a\\0\""),
            ("env", json!({ "a=b": "" }), "env must have names that are not empty, without `=` and NUL, not \"a=b\""),
            ("env", json!({ "a": "\0" }), "env.a must not have a NUL"),
            ("env", json!({ "a": 1 }), "env must be a map of strings to strings"),
            ("inputPaths", json!([INPUT, "/etc"]), "inputPaths[1] must lie in /nix/store, not \"/etc\""),
            ("inputPaths", json!([OUTPUT]), "outputs must not be among inputPaths, not \"/nix/store/liza"),
            ("outputs", json!({}), "outputs must name at least one path"),
            ("outputs", json!({ "a": OUTPUT, "b": OUTPUT }), "and each path once, not \"2\""),
            ("outputs", json!({ "out": "/nix/store/../etc" }), "outputs[out] must begin with 32 digits"),
        ] {
            let mut broken = right.clone();
            broken[field] = value;
            let error = parse(&broken).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        for field in right.as_object().unwrap().keys() {
            let mut broken = right.clone();
            broken.as_object_mut().unwrap().remove(field);
            let error = parse(&broken).unwrap_err();
            assert!(error.starts_with(&format!("{field} must be ")) && error.ends_with("is missing"), "{error}");
        }
        assert!(Description::parse(b"[]").unwrap_err().contains("must be an object"));
    }

    #[test]
    fn a_file_that_is_too_large_or_missing_is_refused() {
        for (path, says) in [("/dev/zero", "must not be larger"), ("/nowhere", "can't read")] {
            let error = Description::read(Path::new(path)).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
            assert_eq!(error.exit().code(), 2);
        }
    }
}
