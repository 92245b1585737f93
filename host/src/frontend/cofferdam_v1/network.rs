//! The connections that a client wants for one build.

use std::{fmt::Display, str::FromStr};

use cofferdam_proto::{EncodedNetwork, cofferdam::v1::Network};
use prost::Message as _;

use crate::{
    network::{Policy, Rules},
    request::{RequestError, RequestErrorKind},
};

/// Most bytes of the message.
const MAX_BYTES: usize = 64 * 1024;

/// The policy of a build whose client has this one, and asks for these connections only.
pub(super) fn narrowed(has: &Policy, asked: &EncodedNetwork) -> Result<Policy, RequestError> {
    let length = asked.as_bytes().len();
    if length > MAX_BYTES {
        let rule = format!("must not be larger than {MAX_BYTES} bytes");
        return Err(wrong("network", rule).got(format_args!("{length} bytes")));
    }
    let Network { allow, allow_addresses } = Network::decode(asked.as_bytes())
        .map_err(|error| wrong("network", format!("must be a binary cofferdam.v1.Network: {error}")))?;
    let rules = Rules {
        allow: rules("network.allow", &allow, |rule| has.covers(rule))?,
        allow_addresses: rules("network.allow_addresses", &allow_addresses, |rule| has.covers_address(rule))?,
        ..Rules::default()
    };
    Ok(has.narrowed(Some(rules), has.limits))
}

/// Refuses connections for a build that asks for no network.
pub(super) fn without_access() -> RequestError {
    wrong("network", "must be absent where constraints.network_access is false")
}

/// Reads rules that the client may ask for.
fn rules<R: FromStr<Err: Display>>(
    field: &str,
    texts: &[String],
    may: impl Fn(&R) -> bool,
) -> Result<Vec<R>, RequestError> {
    let rule = |(index, text): (usize, &String)| {
        let broken = |rule: String| wrong(format!("{field}[{index}]"), rule).got_quoted(text.as_bytes());
        let rule = text.parse().map_err(|error: R::Err| broken(error.to_string()))?;
        if may(&rule) {
            return Ok(rule);
        }
        let error = broken("must not allow more than the daemon's configuration allows this client".into());
        Err(RequestError { kind: RequestErrorKind::Unsupported, ..error })
    };
    texts.iter().enumerate().map(rule).collect()
}

fn wrong(field: impl Display, rule: impl Into<String>) -> RequestError {
    RequestError::new(RequestErrorKind::Invalid, field, rule)
}

#[cfg(test)]
mod tests {
    use cofferdam_proto::BUILD_DESCRIPTOR_SET;
    use prost_reflect::{DescriptorPool, DynamicMessage};

    use super::*;
    use crate::network::Resolvers;

    fn asked(allow: &[&str], allow_addresses: &[&str]) -> EncodedNetwork {
        let strings = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        EncodedNetwork::from(&Network { allow: strings(allow), allow_addresses: strings(allow_addresses) })
    }

    fn has() -> Policy {
        let rules = Rules {
            allow: vec!["*.example:443".parse().unwrap()],
            allow_addresses: vec!["10.0.0.0/8:80".parse().unwrap()],
            ..Rules::default()
        };
        Policy::new(rules, Resolvers::new(Vec::new()))
    }

    #[test]
    fn a_request_gets_what_it_asks_for_within_what_its_client_has() {
        let policy = narrowed(&has(), &asked(&["a.example:443"], &[])).unwrap();
        let [rules] = &policy.narrowed_by[..] else { panic!("{policy:?}") };
        assert_eq!((rules.allow[0].to_string(), rules.allow_addresses.len()), ("a.example:443".into(), 0));
    }

    #[test]
    fn what_is_too_much_or_no_rule_is_refused_by_field() {
        for (asked, expected) in [
            (
                asked(&["a.example:443", "b.example"], &[]),
                "network.allow[1] must not allow more than the daemon's configuration allows this client (got \"b.example\")",
            ),
            (
                asked(&[], &["11.0.0.0/8:80"]),
                "network.allow_addresses[0] must not allow more than the daemon's configuration allows this client (got \"11.0.0.0/8:80\")",
            ),
            (asked(&["a..b"], &[]), "network.allow[0] must be NAME, *.NAME or *, then perhaps :PORT"),
            (asked(&[], &["10.0.0.1:80"]), "network.allow_addresses[0] must be ADDRESS/PREFIX:PORT"),
            (b"\xff".to_vec().into(), "network must be a binary cofferdam.v1.Network"),
            (vec![0; MAX_BYTES + 1].into(), "network must not be larger than 65536 bytes (got 65537 bytes)"),
        ] {
            let error = narrowed(&has(), &asked).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn the_message_is_the_one_that_is_documented() {
        let pool = DescriptorPool::decode(BUILD_DESCRIPTOR_SET).unwrap();
        let descriptor = pool.get_message_by_name("cofferdam.v1.Network").unwrap();
        let message = DynamicMessage::decode(descriptor, asked(&["a"], &["b"]).as_bytes()).unwrap();
        let json = serde_json::to_value(&message).unwrap();
        assert_eq!(json, serde_json::json!({ "allow": ["a"], "allowAddresses": ["b"] }));
    }
}
