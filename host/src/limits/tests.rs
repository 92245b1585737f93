use clap::{Command, FromArgMatches as _};

use super::*;

/// What a flag and its value ask for.
fn flag(name: &str, value: &str) -> Option<Asked> {
    let flag = format!("--{}={value}", name.replace('_', "-"));
    let matches = Asked::augment_args(Command::new("test")).try_get_matches_from(["test", &flag]).ok()?;
    Some(Asked::from_arg_matches(&matches).unwrap())
}

/// What a key of `[build]` and its value ask for.
fn key(name: &str, value: &str) -> Option<Asked> {
    toml::from_str(&format!("{name} = {value:?}")).ok()
}

#[test]
fn every_limit_has_a_flag_a_key_and_a_field_on_the_wire_that_say_the_same() {
    let document = include_str!("../../../docs/daemon.md");
    let default = Limits::default();
    for (name, field) in Limits::NAMES {
        let value = ["200M", "7s", "7"].into_iter().find(|value| flag(name, value).is_some()).unwrap_or_else(|| {
            panic!("--{name} is not a flag");
        });
        let asked = flag(name, value).unwrap();
        assert_eq!(key(name, value), Some(asked.clone()), "build.{name}");
        assert!(document.contains(&format!("\n{name} = ")), "{name} is not in the documented configuration");
        let limits = default.with(&asked);
        assert_ne!(limits, default, "{name}");
        let message = wire::Limits::from(&asked);
        assert_eq!(default.lowered(&message, &Limits::MOST).unwrap(), limits, "{name}");
        let error = default.lowered(&message, &Limits::LEAST).unwrap_err();
        assert_eq!(error.field, format!("limits.{field}"));
    }
}

#[test]
fn the_default_limits_are_within_bounds_and_what_breaks_a_rule_is_named() {
    assert_eq!(Limits::default().broken_rules(&Limits::MOST), []);
    let too_much = Limits::default().broken_rules(&Limits::LEAST);
    assert!(too_much.iter().map(|(name, _)| name).eq(Limits::NAMES.iter().map(|(name, _)| name)), "{too_much:?}");
    let most = Limits { cpus: 4, ..Limits::MOST };
    let wrong = Limits { memory_bytes: 1, cpus: 5, ..Limits::default() };
    let rules = wrong.broken_rules(&most).into_iter().map(|(name, rule)| format!("{name} {rule}"));
    let memory = "memory must be from 128.00 MiB to 16.00 EiB".to_owned();
    assert_eq!(rules.collect::<Vec<_>>(), [memory, "cpus must be from 1 to 4".to_owned()]);
}

#[test]
fn a_build_sees_its_machine_and_neither_its_time_nor_the_size_of_what_it_may_write() {
    let default = Limits::default();
    let sees = |limits: Limits| !limits.visible().eq(default.visible());
    assert!(sees(Limits { memory_bytes: 1 << 30, ..default }));
    assert!(sees(Limits { cpus: 1, ..default }));
    assert!(sees(Limits { scratch_bytes: 1 << 30, ..default }));
    assert!(sees(Limits { processes: 7, ..default }));
    let unseen = Limits {
        timeout: MILLISECOND,
        silence: MILLISECOND,
        inputs_memory_bytes: 1,
        log_bytes: 1,
        output_bytes: 1,
        output_entries: 1,
        ..default
    };
    assert!(!sees(unseen));
}

#[test]
fn limits_go_down_and_never_up() {
    let default = Limits::default();
    let most = Limits { memory_bytes: 4 << 30, ..default };
    let lowered = |asked: wire::Limits| default.lowered(&asked, &most);
    assert_eq!(lowered(wire::Limits::default()).unwrap(), default);
    let less = lowered(wire::Limits { timeout_ms: 1500, cpus: 1, output_entries: 9, ..Default::default() }).unwrap();
    assert_eq!(less, Limits { timeout: Duration::from_millis(1500), cpus: 1, output_entries: 9, ..default });
    let more = lowered(wire::Limits { memory_bytes: 3 << 30, ..Default::default() }).unwrap();
    assert_eq!(more.memory_bytes, 3 << 30);
    for (asked, message) in [
        (
            wire::Limits { memory_bytes: 5 << 30, ..Default::default() },
            "limits.memory_bytes must be from 128.00 MiB to 4.00 GiB, which is what this daemon allows, or 0 (got 5.00 GiB)",
        ),
        (
            wire::Limits { memory_bytes: 1, ..Default::default() },
            "limits.memory_bytes must be from 128.00 MiB to 4.00 GiB, which is what this daemon allows, or 0 (got 1 B)",
        ),
        (
            wire::Limits { log_bytes: default.log_bytes + 1, ..Default::default() },
            "limits.log_bytes must be from 1 B to 1.00 GiB, which is what this daemon allows, or 0 (got 1073741825)",
        ),
        (
            wire::Limits { processes: 1 << 40, ..Default::default() },
            "limits.processes must be from 1 to 16384, which is what this daemon allows, or 0 (got 1099511627776)",
        ),
    ] {
        assert_eq!(lowered(asked).unwrap_err().to_string(), message);
    }
}
