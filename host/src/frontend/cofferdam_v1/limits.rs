use std::time::Duration;

use cofferdam_proto::cofferdam::v1::BuildRequest;
use cofferdam_rpc::Client;

use super::network;
use crate::{
    build::{
        Options,
        secrets::{Secret, Secrets},
    },
    frontend::Allowed,
    limits::{self, Limits},
    request::{RequestError, RequestErrorKind},
};

/// What a build gets: what its client asks for, within what the daemon allows. That may be more memory than the default, as
/// a request may ask for more.
pub(super) fn within(allowed: &Allowed, client: &Client, message: &BuildRequest) -> Result<Options, RequestError> {
    let Allowed { max_memory_bytes, max_shell, .. } = allowed;
    let options = allowed.options(client);
    let most = Limits { memory_bytes: *max_memory_bytes, ..options.limits };
    let shell = match message.shell_ms {
        0 => None,
        asked => Some(limits::allowed("shell_ms", Duration::from_millis(asked), Duration::from_millis(1), *max_shell)?),
    };
    if message.interactive && shell.is_some() {
        let rule = "must be 0 where interactive is set";
        return Err(RequestError::new(RequestErrorKind::Invalid, "shell_ms", rule));
    }
    let network = match (options.network, &message.network) {
        (Some(has), Some(asked)) => Some(has.with_policy(network::narrowed(&has.policy, asked)?)),
        (has, _) => has,
    };
    let secrets = message
        .secrets
        .iter()
        .map(|secret| Secret { name: secret.name.clone(), contents: secret.contents.to_vec().into() });
    Ok(Options {
        limits: options.limits.lowered(&message.limits.unwrap_or_default(), &most)?,
        keep_failed: options.keep_failed || message.keep_failed,
        shell,
        network,
        secrets: Secrets::new(secrets.collect())?,
        interactive: message.interactive,
    })
}

#[cfg(test)]
mod tests {
    use cofferdam_proto::cofferdam::v1;

    use super::*;

    #[test]
    fn a_client_gets_what_it_asks_for_if_its_daemon_allows_that() {
        let options = Options::default();
        let (max_memory_bytes, max_shell) = (4 << 30, Duration::from_secs(60));
        let allowed = Allowed { options: options.clone(), max_memory_bytes, max_shell, network: None };
        let within = |message: BuildRequest| within(&allowed, &Client::User(1), &message);
        assert_eq!(within(BuildRequest::default()).unwrap(), options);
        let asked = v1::Limits { memory_bytes: 3 << 30, timeout_ms: 1500, ..v1::Limits::default() };
        let message = BuildRequest { limits: Some(asked), keep_failed: true, shell_ms: 60_000, ..Default::default() };
        let limits = Limits { memory_bytes: 3 << 30, timeout: Duration::from_millis(1500), ..options.limits };
        let expected = Options { limits, keep_failed: true, shell: Some(Duration::from_secs(60)), ..options };
        assert_eq!(within(message).unwrap(), expected);
        let asked = v1::Limits { memory_bytes: 5 << 30, ..v1::Limits::default() };
        let wrong = within(BuildRequest { limits: Some(asked), ..Default::default() }).unwrap_err();
        assert_eq!(wrong.field, "limits.memory_bytes");
        let secret = v1::Secret { name: "a".to_owned(), contents: vec![0; (1 << 20) + 1].into() };
        let wrong = within(BuildRequest { secrets: vec![secret], ..Default::default() }).unwrap_err();
        assert_eq!(wrong.field, "secrets[0].contents");
        let wrong = within(BuildRequest { shell_ms: 1, interactive: true, ..Default::default() }).unwrap_err();
        assert_eq!(wrong.field, "shell_ms");
        let wrong = within(BuildRequest { shell_ms: 60_001, ..Default::default() }).unwrap_err();
        let rule = "shell_ms must be from 1ms to 1m, which is what this daemon allows, or 0 (got 1m 1ms)";
        assert_eq!(wrong.to_string(), rule);
    }
}
