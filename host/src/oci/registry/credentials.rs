//! Credentials in Docker's configuration, which `docker login` and similar programs write.

use std::{
    collections::BTreeMap,
    env,
    fs::File,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use data_encoding::BASE64;
use serde::Deserialize;

/// Limit on the configuration, and on the answer of a helper.
const MAX_BYTES: u64 = 1024 * 1024;

/// A user's name and password.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    pub(super) user: String,
    pub(super) password: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Configuration {
    auths: BTreeMap<String, Login>,
    creds_store: Option<String>,
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Login {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// The file that has them.
pub(crate) fn file() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("DOCKER_CONFIG").or_else(|| Some(set("HOME")?.join(".docker"))).map(|dir| dir.join("config.json"))
}

/// The credentials for a registry in a configuration, if there are any.
pub(super) fn of(host: &str, file: Option<&Path>) -> io::Result<Option<Credentials>> {
    let Some(file) = file else { return Ok(None) };
    let mut text = Vec::new();
    match File::open(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?.take(MAX_BYTES).read_to_end(&mut text)?,
    };
    let wrong = |error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", file.display()));
    let configuration: Configuration = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    if let Some(helper) = configuration.cred_helpers.get(host) {
        return ask(helper, host);
    }
    let own = configuration.auths.iter().find(|(of, _)| without_path(of) == host).map(|(_, login)| login);
    if let Some(found) = own.map(Login::credentials).transpose().map_err(wrong)?.flatten() {
        return Ok(Some(found));
    }
    configuration.creds_store.map_or(Ok(None), |helper| ask(&helper, host))
}

/// The host of a key, which may be a URL.
fn without_path(key: &str) -> &str {
    let key = key.split_once("://").map_or(key, |(_, rest)| rest);
    key.split('/').next().unwrap_or_default()
}

impl Login {
    fn credentials(&self) -> Result<Option<Credentials>, String> {
        if let Some(auth) = self.auth.as_ref().filter(|auth| !auth.is_empty()) {
            let plain = BASE64.decode(auth.as_bytes()).ok().and_then(|plain| String::from_utf8(plain).ok());
            let (user, password) = plain
                .as_deref()
                .and_then(|plain| plain.split_once(':'))
                .ok_or("an \"auth\" must be the base64 of a user, a colon and a password")?;
            // Some versions of Docker end it with a NUL.
            let password = password.trim_end_matches('\0');
            return Ok(Some(Credentials { user: user.to_owned(), password: password.to_owned() }));
        }
        let both = self.username.clone().zip(self.password.clone());
        Ok(both.map(|(user, password)| Credentials { user, password }))
    }
}

/// Asks a helper program of Docker's, whose name follows `docker-credential-`.
fn ask(helper: &str, host: &str) -> io::Result<Option<Credentials>> {
    let program = format!("docker-credential-{helper}");
    if helper.contains('/') {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the helper {helper:?} is not a name")));
    }
    let failed = |error: io::Error| io::Error::new(error.kind(), format!("{program}: {error}"));
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(host.as_bytes()).map_err(failed)?;
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_BYTES).read_to_end(&mut answer).map_err(failed)?;
    }
    // Without credentials for the host it fails.
    if !child.wait().map_err(failed)?.success() {
        return Ok(None);
    }
    let answer: Answer = serde_json::from_slice(&answer)
        .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error.to_string())))?;
    Ok(Some(Credentials { user: answer.username, password: answer.secret }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_is_a_pair_or_its_base64() {
        let read = |text: &str| serde_json::from_str::<Login>(text).unwrap().credentials();
        let expected = Credentials { user: "u".into(), password: "p:q".into() };
        let encoded = BASE64.encode(b"u:p:q");
        assert!(read(&format!("{{\"auth\":\"{encoded}\"}}")) == Ok(Some(expected.clone())));
        assert!(read("{\"username\":\"u\",\"password\":\"p:q\"}") == Ok(Some(expected)));
        assert!(read("{}") == Ok(None));
        assert!(read("{\"auth\":\"\"}") == Ok(None));
        assert!(read("{\"auth\":\"?\"}").is_err());
    }

    #[test]
    fn keys_may_be_urls() {
        for key in ["registry.example:5000", "https://registry.example:5000", "https://registry.example:5000/v1/"] {
            assert_eq!(without_path(key), "registry.example:5000");
        }
    }
}
