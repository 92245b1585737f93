//! The rules of `snix.build.v1.BuildRequest`, each checked once, here.
//!
//! Beyond the format's own rules: nothing empty is an output, an additional file or a needle (the first two would
//! be the build's root, the last is everywhere); strings that the kernel takes NUL-terminated hold none; counts and
//! sizes are bounded. An output may lie within another one.
//!
//! The format requires sorted lists. Not all of its clients sort them (snix sends the outputs in the order of their names). The
//! order doesn't change the build, so any order is accepted.

use std::{
    collections::{BTreeMap, HashMap, hash_map},
    fmt,
};

use cofferdam_castore::{
    DigestError, Node, PathComponent,
    proto::{Entry, EntryError, EntryExt as _, entry},
    refscan::{MAX_AUTOMATON_SIZE, automaton_size},
};
use cofferdam_proto::snix::build::v1::{self as proto, build_request as wire};
use cofferdam_protocol::{MAX_CA_FILE_BYTES, MAX_SECRET_BYTES, MAX_SECRETS, frame};

use super::{
    AbsolutePath, AdditionalFile, BuildConstraints, BuildRequest, EnvVar, RelativePath, RequestError, RequestErrorKind,
    counts::Counts,
};

/// Most entries of `inputs`.
pub const MAX_INPUTS: usize = 65_536;
/// Most entries of `command_args`.
pub const MAX_ARGS: usize = 65_536;
/// Longest argument, and longest `key=value` of the environment, in bytes: Linux's `MAX_ARG_STRLEN` less its NUL.
pub const MAX_ARG_BYTES: usize = 128 * 1024 - 1;
/// Most entries of `scratch_paths`; each is a mount in the guest.
pub const MAX_SCRATCH_PATHS: usize = 1024;
/// Most entries of `outputs`.
pub const MAX_OUTPUTS: usize = 4096;
/// Most entries of `environment_vars`.
pub const MAX_ENVIRONMENT_VARS: usize = 65_536;
/// Most entries of `constraints.available_ro_paths`.
pub const MAX_RO_PATHS: usize = 1024;
/// Most entries of `additional_files`.
pub const MAX_ADDITIONAL_FILES: usize = 65_536;
/// Most entries of `refscan_needles`.
pub const MAX_NEEDLES: usize = 65_536;
/// Longest of `refscan_needles`, in bytes.
pub const MAX_NEEDLE_BYTES: usize = 4096;
/// Most pairs of an output and a needle. Each pair may be an index in the result.
pub const MAX_OUTPUT_NEEDLES: usize = 4 * 1024 * 1024;
/// Most bytes of what a guest is told: it goes over in one frame.
pub const MAX_SPECIFICATION_BYTES: usize =
    frame::MAX_FROM_HOST_BYTES - MAX_CA_FILE_BYTES - MAX_SECRETS * (MAX_SECRET_BYTES + 512) - 1024;
/// Most bytes of an encoded request, binary or ProtoJSON; room for the largest specification in base64, and inputs.
pub const MAX_ENCODED_BYTES: usize = 160 * 1024 * 1024;

type Result<T, E = RequestError> = std::result::Result<T, E>;

impl TryFrom<proto::BuildRequest> for BuildRequest {
    type Error = RequestError;

    fn try_from(message: proto::BuildRequest) -> Result<Self> {
        Counts::of_message(&message).check()?;
        let mut request = Self {
            inputs: inputs(message.inputs)?,
            command_args: command_args(message.command_args)?,
            working_dir: relative("working_dir", &message.working_dir)?,
            scratch_paths: unique_paths("scratch_paths", &message.scratch_paths)?,
            inputs_dir: relative("inputs_dir", &message.inputs_dir)?,
            outputs: unique_paths("outputs", &message.outputs)?,
            environment_vars: environment_vars(message.environment_vars)?,
            constraints: message.constraints.map(constraints).transpose()?,
            additional_files: additional_files(message.additional_files)?,
            refscan_needles: refscan_needles(message.refscan_needles)?,
            _checked: (),
        };
        if let Some(index) = request.outputs.iter().position(RelativePath::is_root) {
            let rule = "must not be empty: name what the build makes below its root";
            return Err(RequestError::invalid(format_args!("outputs[{index}]"), rule));
        }
        let pairs = request.outputs.len() * request.refscan_needles.len();
        if pairs > MAX_OUTPUT_NEEDLES {
            let rule = format!("times outputs must not be more than {MAX_OUTPUT_NEEDLES}");
            return Err(RequestError::invalid("refscan_needles", rule).got(pairs));
        }
        check_not_reserved(&request)?;
        check_places(&request)?;
        check_specification_bytes(&request)?;
        // Only now: errors name entries by their places in the message.
        request.scratch_paths.sort_unstable();
        request.environment_vars.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        request.additional_files.sort_unstable_by(|one, other| one.path.cmp(&other.path));
        Ok(request)
    }
}

/// What the guest mounts there is the kernel's, and hides everything else.
fn check_not_reserved(request: &BuildRequest) -> Result<()> {
    let scratch = request.scratch_paths.iter().enumerate().map(|(at, path)| (format!("scratch_paths[{at}]"), path));
    let files = &request.additional_files;
    let files = files.iter().enumerate().map(|(at, file)| (format!("additional_files[{at}].path"), &file.path));
    let inputs_dir = std::iter::once(("inputs_dir".to_owned(), &request.inputs_dir));
    for (field, path) in inputs_dir.chain(scratch).chain(files) {
        if path.as_path().starts_with("dev") || path.as_path().starts_with("proc") {
            return Err(broken(
                field,
                "must not lie in dev or proc, which belong to the guest's kernel",
                path.as_str(),
            ));
        }
    }
    Ok(())
}

pub(crate) fn check_encoded_bytes(length: usize) -> Result<()> {
    if length <= MAX_ENCODED_BYTES {
        return Ok(());
    }
    let rule = format!("must not be larger than {MAX_ENCODED_BYTES} bytes; put large files into inputs");
    Err(RequestError::new(RequestErrorKind::Malformed, "the request", rule).got(format_args!("{length} bytes")))
}

fn inputs(entries: Vec<Entry>) -> Result<BTreeMap<PathComponent, Node>> {
    let mut named = Vec::with_capacity(entries.len());
    for (index, entry) in entries.into_iter().enumerate() {
        let variant = match entry.entry {
            None => "",
            Some(entry::Entry::Directory(_)) => ".directory",
            Some(entry::Entry::File(_)) => ".file",
            Some(entry::Entry::Symlink(_)) => ".symlink",
        };
        let field = format!("inputs[{index}]{variant}");
        let (name, node) = entry.try_into_named().map_err(|error| entry_error(&field, error))?;
        named.push((field, name, node));
    }
    check_unique(named.iter().map(|(field, name, _)| (format!("{field}.name"), name.as_bytes())))?;
    Ok(named.into_iter().map(|(_, name, node)| (name, node)).collect())
}

fn entry_error(field: &str, error: EntryError) -> RequestError {
    match error {
        EntryError::Absent => RequestError::invalid(field, "must be a directory, a file or a symlink"),
        EntryError::Name(error) => {
            RequestError::invalid(format_args!("{field}.name"), error.rule).got(format_args!("\"{}\"", error.name))
        }
        EntryError::Named(name) => {
            RequestError::invalid(format_args!("{field}.name"), "must be empty").got(format_args!("\"{name}\""))
        }
        EntryError::Target(error) => {
            RequestError::invalid(format_args!("{field}.target"), error.rule).got(format_args!("\"{}\"", error.target))
        }
        EntryError::Digest(error) => {
            let refused = RequestError::invalid(format_args!("{field}.digest"), "must be 32 bytes of BLAKE3");
            match error {
                DigestError::Length(length) => refused.got(format_args!("{length} bytes")),
                DigestError::Text { text } => refused.got(text),
            }
        }
    }
}

fn command_args(args: Vec<String>) -> Result<Vec<String>> {
    match args.first() {
        None => return Err(RequestError::invalid("command_args", "must not be empty: name the command to run")),
        Some(command) if command.is_empty() => {
            return Err(RequestError::invalid("command_args[0]", "must not be empty: it is the command to run"));
        }
        Some(_) => {}
    }
    for (index, arg) in args.iter().enumerate() {
        let field = format_args!("command_args[{index}]");
        if arg.contains('\0') {
            return Err(broken(field, "must not hold a NUL", arg));
        }
        if arg.len() > MAX_ARG_BYTES {
            return Err(too_long(field, MAX_ARG_BYTES, arg.len()));
        }
    }
    Ok(args)
}

fn environment_vars(vars: Vec<wire::EnvVar>) -> Result<Vec<EnvVar>> {
    for (index, wire::EnvVar { key, value }) in vars.iter().enumerate() {
        let field = format_args!("environment_vars[{index}].key");
        if key.is_empty() {
            return Err(RequestError::invalid(field, "must not be empty"));
        }
        if key.contains('=') {
            return Err(broken(field, "must not hold a \"=\"", key));
        }
        if key.contains('\0') {
            return Err(broken(field, "must not hold a NUL", key));
        }
        let field = format_args!("environment_vars[{index}].value");
        if value.contains(&0) {
            return Err(RequestError::invalid(field, "must not hold a NUL").got_quoted(value));
        }
        let length = key.len() + 1 + value.len();
        if length > MAX_ARG_BYTES {
            let rule = format!("must not be longer than {MAX_ARG_BYTES} bytes with key and \"=\"");
            return Err(RequestError::invalid(field, rule).got(format_args!("{length} bytes")));
        }
    }
    check_unique(
        vars.iter().enumerate().map(|(index, var)| (format!("environment_vars[{index}].key"), var.key.as_bytes())),
    )?;
    Ok(vars.into_iter().map(|wire::EnvVar { key, value }| EnvVar { key, value }).collect())
}

fn constraints(constraints: wire::BuildConstraints) -> Result<BuildConstraints> {
    if constraints.system.is_empty() {
        return Err(RequestError::invalid(
            "constraints.system",
            "must not be empty: name it, or leave out constraints",
        ));
    }
    let field = |index| format!("constraints.available_ro_paths[{index}]");
    let check =
        |(index, path): (usize, String)| AbsolutePath::new(&path).map_err(|rule| broken(field(index), rule, &path));
    let mut paths: Vec<_> = constraints.available_ro_paths.into_iter().enumerate().map(check).collect::<Result<_>>()?;
    check_unique(paths.iter().enumerate().map(|(index, path)| (field(index), path.as_str().as_bytes())))?;
    paths.sort_unstable();
    Ok(BuildConstraints {
        system: constraints.system,
        min_memory: constraints.min_memory,
        available_ro_paths: paths,
        network_access: constraints.network_access,
        provide_bin_sh: constraints.provide_bin_sh,
    })
}

fn additional_files(files: Vec<wire::AdditionalFile>) -> Result<Vec<AdditionalFile>> {
    let field = |index| format!("additional_files[{index}].path");
    let check = |(index, file): (usize, wire::AdditionalFile)| {
        Ok(AdditionalFile { path: relative(field(index), &file.path)?, contents: file.contents })
    };
    let files: Vec<_> = files.into_iter().enumerate().map(check).collect::<Result<_>>()?;
    check_unique(files.iter().enumerate().map(|(index, file)| (field(index), file.path.as_str().as_bytes())))?;
    Ok(files)
}

fn refscan_needles(needles: Vec<String>) -> Result<Vec<String>> {
    for (index, needle) in needles.iter().enumerate() {
        let field = format_args!("refscan_needles[{index}]");
        if needle.is_empty() {
            return Err(RequestError::invalid(field, "must not be empty: it would be found everywhere"));
        }
        if needle.len() > MAX_NEEDLE_BYTES {
            return Err(too_long(field, MAX_NEEDLE_BYTES, needle.len()));
        }
    }
    let size = automaton_size(&needles);
    if size > MAX_AUTOMATON_SIZE {
        let rule = format!(
            "must not need more than {MAX_AUTOMATON_SIZE} states and matches in a search automaton: give fewer, shorter \
             or more equally long ones"
        );
        return Err(RequestError::invalid("refscan_needles", rule).got(size));
    }
    Ok(needles)
}

impl BuildRequest {
    /// The same request with these inputs. A client that has to import them first checks everything else before.
    ///
    /// # Errors
    ///
    /// There are too many, or an additional file would lie in one of them.
    pub fn with_inputs(mut self, inputs: BTreeMap<PathComponent, Node>) -> Result<Self> {
        Counts::of_inputs(inputs.len()).check()?;
        self.inputs = inputs;
        check_places(&self)?;
        Ok(self)
    }
}

fn check_places(request: &BuildRequest) -> Result<()> {
    for (index, file) in request.additional_files.iter().enumerate() {
        check_place(request, &file.path)
            .map_err(|rule| broken(format_args!("additional_files[{index}].path"), rule, file.path.as_str()))?;
    }
    Ok(())
}

/// Whether a file can be placed there: not where a directory must be, and not within an input.
fn check_place(request: &BuildRequest, path: &RelativePath) -> Result<(), &'static str> {
    if path.is_root() {
        return Err("must not be empty: it would be the build's root");
    }
    if request.inputs_dir.is_within(path) {
        return Err("must not be inputs_dir or above it");
    }
    if request.working_dir.is_within(path) {
        return Err("must not be working_dir or above it");
    }
    let within_inputs_dir = path.as_path().strip_prefix(request.inputs_dir.as_path()).ok();
    let first = within_inputs_dir.and_then(|rest| rest.components().next());
    match first {
        Some(name) if request.inputs.contains_key(name.as_os_str().as_encoded_bytes()) => {
            Err("must not be or lie within an input: inputs are content-addressed and never change")
        }
        _ => Ok(()),
    }
}

/// Bounds the frame that carries a specification by what each part takes at most: its bytes and a length.
fn check_specification_bytes(request: &BuildRequest) -> Result<()> {
    const LENGTH_BYTES: usize = 5;
    let paths = |paths: &[RelativePath]| paths.iter().map(|path| path.as_str().len() + LENGTH_BYTES).sum::<usize>();
    let bytes = request.command_args.iter().map(|arg| arg.len() + LENGTH_BYTES).sum::<usize>()
        + request.environment_vars.iter().map(|var| var.key.len() + var.value.len() + 2 * LENGTH_BYTES).sum::<usize>()
        + paths(&request.scratch_paths)
        + paths(&request.outputs)
        + request
            .constraints
            .iter()
            .flat_map(|constraints| &constraints.available_ro_paths)
            .map(|path| path.as_str().len() + LENGTH_BYTES)
            .sum::<usize>()
        + request
            .additional_files
            .iter()
            .map(|file| file.path.as_str().len() + file.contents.len() + 2 * LENGTH_BYTES)
            .sum::<usize>()
        + request.working_dir.as_str().len()
        + request.inputs_dir.as_str().len();
    if bytes <= MAX_SPECIFICATION_BYTES {
        return Ok(());
    }
    let rule = format!(
        "with command_args, environment_vars and all paths must not hold more than {MAX_SPECIFICATION_BYTES} bytes; \
         put large files into inputs"
    );
    Err(RequestError::invalid("additional_files", rule).got(format_args!("{bytes} bytes")))
}

fn relative(field: impl fmt::Display, path: &str) -> Result<RelativePath> {
    RelativePath::new(path).map_err(|rule| broken(field, rule, path))
}

fn unique_paths(list: &str, paths: &[String]) -> Result<Vec<RelativePath>> {
    let field = |index| format!("{list}[{index}]");
    let checked: Vec<_> =
        paths.iter().enumerate().map(|(index, path)| relative(field(index), path)).collect::<Result<_>>()?;
    check_unique(checked.iter().enumerate().map(|(index, path)| (field(index), path.as_str().as_bytes())))?;
    Ok(checked)
}

/// No key may be there twice.
fn check_unique<'a, F: fmt::Display>(keys: impl Iterator<Item = (F, &'a [u8])>) -> Result<()> {
    let mut first = HashMap::new();
    for (field, key) in keys {
        match first.entry(key) {
            hash_map::Entry::Vacant(place) => drop(place.insert(field)),
            hash_map::Entry::Occupied(earlier) => {
                let rule = format!("must not be a duplicate of {}", earlier.get());
                return Err(RequestError::invalid(field, rule).got_quoted(key));
            }
        }
    }
    Ok(())
}

fn broken(field: impl fmt::Display, rule: &str, value: &str) -> RequestError {
    RequestError::invalid(field, rule).got_quoted(value.as_bytes())
}

fn too_long(field: impl fmt::Display, limit: usize, length: usize) -> RequestError {
    RequestError::invalid(field, format!("must not be longer than {limit} bytes")).got(format_args!("{length} bytes"))
}
