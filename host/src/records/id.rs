use std::{fmt, str::FromStr, time::SystemTime};

use parking_lot::Mutex;
use uuid::{Uuid, Variant};

/// Random bits of a UUIDv7, after its time.
const RANDOM_BITS: u32 = 74;

/// Random bits after the variant.
const LOW_BITS: u32 = 62;

/// Random bits of the step from one id to the next when the clock has not moved.
const STEP_BITS: u32 = 56;

/// A build's id: a UUIDv7, so ids sort by time and can't be guessed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BuildId(Uuid);

/// Text that is not a build id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a build id: write a UUIDv7 in lower case with its hyphens, as `cofferdam builds list` does")]
pub struct BuildIdError {
    /// The beginning of the text.
    pub text: String,
}

impl BuildId {
    /// `None` unless the number is a UUIDv7.
    pub(super) fn from_u128(number: u128) -> Option<Self> {
        let uuid = Uuid::from_u128(number);
        (uuid.get_version_num() == 7 && uuid.get_variant() == Variant::RFC4122).then_some(Self(uuid))
    }

    pub(super) fn as_u128(self) -> u128 {
        self.0.as_u128()
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl fmt::Debug for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for BuildId {
    type Err = BuildIdError;

    fn from_str(text: &str) -> Result<Self, BuildIdError> {
        // Uuid accepts other forms, too.
        let id = Uuid::try_parse(text).ok().and_then(|uuid| Self::from_u128(uuid.as_u128()));
        id.filter(|id| id.to_string() == text).ok_or_else(|| BuildIdError { text: text.chars().take(64).collect() })
    }
}

/// Makes ids, each greater than all before it, even across restarts and when the clock is set back. (A context of the crate
/// `uuid` keeps the order within one process only.)
#[derive(Debug)]
pub(super) struct Ids {
    /// Time and random bits of the latest id.
    latest: Mutex<u128>,
}

impl Ids {
    pub(super) fn after(latest: Option<BuildId>) -> Self {
        Self { latest: Mutex::new(latest.map_or(0, payload)) }
    }

    pub(super) fn next(&self, now: SystemTime) -> BuildId {
        let millis = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
        // The random bits of a UUIDv4 are those of a UUIDv7 and some more.
        let random = payload(BuildId(Uuid::new_v4())) & mask(RANDOM_BITS);
        let fresh = ((millis & mask(48)) << RANDOM_BITS) | random;
        let mut latest = self.latest.lock();
        *latest = if fresh > *latest { fresh } else { *latest + 1 + (random & mask(STEP_BITS)) };
        let (upper, low) = (*latest >> LOW_BITS, *latest & mask(LOW_BITS));
        BuildId(Uuid::from_u128(((upper >> 12) << 80) | (7 << 76) | ((upper & mask(12)) << 64) | (2 << LOW_BITS) | low))
    }
}

/// The bits of an id without version and variant.
fn payload(id: BuildId) -> u128 {
    let number = id.as_u128();
    ((number >> 80) << RANDOM_BITS) | (((number >> 64) & mask(12)) << LOW_BITS) | (number & mask(LOW_BITS))
}

const fn mask(bits: u32) -> u128 {
    (1 << bits) - 1
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn ids_ascend_with_any_clock_and_survive_a_round_trip(times in vec(0..10_u64.pow(15), 1..50)) {
            let mut ids = Ids::after(None);
            let mut latest = None;
            for (index, millis) in times.into_iter().enumerate() {
                if index == 20 {
                    ids = Ids::after(latest);
                }
                let id = ids.next(SystemTime::UNIX_EPOCH + Duration::from_millis(millis));
                prop_assert!(Some(id) > latest);
                prop_assert_eq!(id.to_string().parse(), Ok(id));
                prop_assert_eq!(BuildId::from_u128(id.as_u128()), Some(id));
                latest = Some(id);
            }
        }

        #[test]
        fn no_other_text_is_an_id(text in "[0-9a-fA-F{}-]{0,40}|\\PC{0,40}") {
            if let Ok(id) = text.parse::<BuildId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }

    #[test]
    fn an_id_has_the_time_of_its_build() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(0x0192_3456_789a);
        assert!(Ids::after(None).next(now).to_string().starts_with("01923456-789a-7"));
    }

    #[test]
    fn other_forms_and_versions_are_refused() {
        let id = Ids::after(None).next(SystemTime::now()).to_string();
        let wrong = [
            String::new(),
            id.to_uppercase().replace('-', ""),
            id.replace('-', ""),
            format!("{{{id}}}"),
            format!("urn:uuid:{id}"),
            format!("{id} "),
            Uuid::new_v4().to_string(),
            Uuid::nil().to_string(),
            "x".repeat(1 << 20),
        ];
        for text in wrong {
            let error = text.parse::<BuildId>().unwrap_err().to_string();
            assert!(error.len() < 200 && error.contains("is not a build id"), "{error}");
        }
    }
}
