use std::time::Duration;

use cofferdam_proto::cofferdam::v1::{BuildRequest, Limits};
use cofferdam_protocol::tree;

use crate::{
    build::Options,
    frontend::Allowed,
    request::{RequestError, RequestErrorKind},
};

/// What a build gets: what its client asks for, within what the daemon allows.
pub(super) fn within(allowed: &Allowed, message: &BuildRequest) -> Result<Options, RequestError> {
    let Allowed { options, max_memory_bytes, max_shell } = allowed;
    let options = lowered(options, *max_memory_bytes, &message.limits.unwrap_or_default())?;
    let shell = match message.shell_ms {
        0 => None,
        asked => Some(Duration::from_millis(at_most("shell_ms", asked, 1, ms(*max_shell))?)),
    };
    Ok(Options { keep_failed: options.keep_failed || message.keep_failed, shell, ..options })
}

/// A client may ask for more memory than the default, as a request may.
fn lowered(most: &Options, max_memory: u64, asked: &Limits) -> Result<Options, RequestError> {
    Ok(Options {
        memory_bytes: match lower(
            "memory_bytes",
            asked.memory_bytes,
            crate::machine::vmm::MIN_MEMORY_BYTES,
            max_memory,
        )? {
            _ if asked.memory_bytes == 0 => most.memory_bytes,
            memory_bytes => memory_bytes,
        },
        cpus: lower("cpus", asked.cpus.into(), 1, most.cpus.into())?.try_into().unwrap_or(most.cpus),
        scratch_bytes: lower(
            "scratch_bytes",
            asked.scratch_bytes,
            cofferdam_images::SCRATCH_TEMPLATE_BYTES,
            most.scratch_bytes,
        )?,
        timeout: Duration::from_millis(lower("timeout_ms", asked.timeout_ms, 1, ms(most.timeout))?),
        silence: match lower("silence_ms", asked.silence_ms, 1, most.silence.map_or(u64::MAX, ms))? {
            _ if asked.silence_ms == 0 => most.silence,
            silence_ms => Some(Duration::from_millis(silence_ms)),
        },
        processes: lower("processes", asked.processes, 1, most.processes.into())?.try_into().unwrap_or(most.processes),
        log_bytes: lower("log_bytes", asked.log_bytes, 1, most.log_bytes)?,
        outputs: tree::Limits {
            bytes: lower("output_bytes", asked.output_bytes, 1, most.outputs.bytes)?,
            entries: lower("output_entries", asked.output_entries, 1, most.outputs.entries)?,
        },
        keep_failed: most.keep_failed,
        shell: most.shell,
    })
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn lower(field: &str, asked: u64, least: u64, most: u64) -> Result<u64, RequestError> {
    if asked == 0 { Ok(most) } else { at_most(&format!("limits.{field}"), asked, least, most) }
}

fn at_most(field: &str, asked: u64, least: u64, most: u64) -> Result<u64, RequestError> {
    if (least..=most).contains(&asked) {
        return Ok(asked);
    }
    let rule = format!("must be from {least} to {most}, which is what this daemon allows, or 0");
    Err(RequestError::new(RequestErrorKind::Unsupported, field, rule).got(asked))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_go_down_and_never_up() {
        let most = Options::default();
        let within = |most: &Options, asked: Option<&Limits>| {
            let allowed =
                Allowed { options: most.clone(), max_memory_bytes: 4 << 30, max_shell: Duration::from_secs(60) };
            within(&allowed, &BuildRequest { limits: asked.copied(), ..BuildRequest::default() })
        };
        assert_eq!(within(&most, None).unwrap(), most);
        assert_eq!(within(&most, Some(&Limits::default())).unwrap(), most);
        let asked = Limits { timeout_ms: 1500, cpus: 1, output_entries: 9, ..Limits::default() };
        let less = within(&most, Some(&asked)).unwrap();
        assert_eq!((less.timeout, less.cpus, less.outputs.entries), (Duration::from_millis(1500), 1, 9));
        assert_eq!(less.memory_bytes, most.memory_bytes);
        let more = within(&most, Some(&Limits { memory_bytes: 3 << 30, ..Limits::default() })).unwrap();
        assert_eq!(more.memory_bytes, 3 << 30);
        for (asked, field) in [
            (Limits { memory_bytes: 5 << 30, ..Limits::default() }, "limits.memory_bytes"),
            (Limits { log_bytes: most.log_bytes + 1, ..Limits::default() }, "limits.log_bytes"),
            (Limits { memory_bytes: 1, ..Limits::default() }, "limits.memory_bytes"),
            (Limits { cpus: u32::MAX, ..Limits::default() }, "limits.cpus"),
        ] {
            assert_eq!(within(&most, Some(&asked)).unwrap_err().field, field);
        }
    }
}
