//! Which machine to pretend to be: the environment, and what the pretended devices report.

use crate::memory;

/// Everything that the environment decides; read once, at the first call.
#[derive(Clone, Debug)]
pub struct Config {
    /// Compute capability times ten.
    pub arch: u32,
    /// How many devices.
    pub devices: usize,
    /// Bytes of memory per device.
    pub memory: u64,
    /// Bytes between two allocations.
    pub gap: u64,
    /// What `cuInit` returns.
    pub init: u32,
    /// What `cuDriverGetVersion` says.
    pub driver: i32,
    /// Seed of every random choice.
    pub seed: u64,
    /// Races and uninitialised reads are faults.
    pub checks: bool,
    /// Devices have memory pools.
    pub pools: bool,
    /// Where to append one line per launch.
    pub report: Option<String>,
    /// A file of PTX that modules are made of instead of their image.
    pub ptx_from: Option<String>,
    /// Where to write the PTX that a module is made of.
    pub ptx_to: Option<String>,
    /// Warp instructions without a finished block after which a launch is hung.
    pub watchdog: u64,
}

impl Config {
    /// Reads the environment. A value that cannot be understood is a message for `cuInit`.
    pub fn from_env() -> Result<Config, String> {
        Config::from_vars(&|name| std::env::var(format!("PW_EMULATOR_{name}")).ok())
    }

    fn from_vars(var: &dyn Fn(&str) -> Option<String>) -> Result<Config, String> {
        fn number<T: std::str::FromStr>(
            var: &dyn Fn(&str) -> Option<String>,
            name: &str,
            default: T,
        ) -> Result<T, String> {
            match var(name) {
                None => Ok(default),
                Some(text) => text
                    .trim()
                    .parse()
                    .map_err(|_| format!("PW_EMULATOR_{name}={text} is not a number")),
            }
        }
        let flag = |name: &str| -> Result<bool, String> {
            match var(name).as_deref() {
                None | Some("1") => Ok(true),
                Some("0") => Ok(false),
                Some(other) => Err(format!("PW_EMULATOR_{name}={other} is neither 0 nor 1")),
            }
        };
        let path = |name: &str| var(name).filter(|path| !path.is_empty());
        let arch = match var("ARCH") {
            None => 90,
            Some(text) => text
                .trim_start_matches("sm_")
                .parse()
                .map_err(|_| format!("PW_EMULATOR_ARCH={text} is not sm_NN"))?,
        };
        Ok(Config {
            arch,
            devices: number(var, "DEVICES", 1)?,
            memory: match var("MEMORY") {
                None => 4 << 30,
                Some(text) => bytes(&text)
                    .ok_or_else(|| format!("PW_EMULATOR_MEMORY={text} is not a size"))?,
            },
            gap: match var("GAP") {
                None => memory::GAP,
                Some(text) => bytes(&text)
                    .filter(|gap| (memory::GAP..=1 << 36).contains(gap))
                    .ok_or_else(|| format!("PW_EMULATOR_GAP={text} is not a size of 64K to 64G"))?,
            },
            init: number(var, "INIT", 0)?,
            driver: number(var, "DRIVER", 13_000)?,
            seed: number(var, "SEED", 1)?,
            checks: flag("CHECKS")?,
            pools: flag("POOLS")?,
            report: path("REPORT"),
            ptx_from: path("PTX_FROM"),
            ptx_to: path("PTX_TO"),
            watchdog: number(var, "WATCHDOG", 1_000_000_000)?,
        })
    }

    /// The newest PTX version that this driver understands, times ten.
    pub fn ptx_version(&self) -> u32 {
        match self.driver {
            ..12_000 => 78,
            12_000..12_010 => 80,
            12_010..12_020 => 81,
            12_020..12_030 => 82,
            12_030..12_040 => 83,
            12_040..12_050 => 84,
            12_050..12_070 => 85,
            12_070..12_080 => 86,
            12_080..12_090 => 87,
            12_090..13_000 => 88,
            13_000..13_010 => 90,
            newer => 91 + (newer as u32 - 13_010) / 10,
        }
    }

    /// A name that nobody takes for a real card.
    pub fn name(&self) -> String {
        let like = match self.arch {
            75 => "T4",
            80 => "A100",
            90 => "H100",
            _ => "GPU",
        };
        format!("pointwise emulator (like {like}, sm_{})", self.arch)
    }

    fn facts(&self) -> Facts {
        match self.arch {
            ..80 => Facts {
                processors: 40,
                l2: 4 << 20,
                shared_block: 64 << 10,
                shared_processor: 64 << 10,
                reserved: 0,
                threads: 1024,
                blocks: 16,
                clock: 1_590_000,
                memory_clock: 5_001_000,
                bus: 256,
            },
            80..90 => Facts {
                processors: 108,
                l2: 40 << 20,
                shared_block: 163 << 10,
                shared_processor: 164 << 10,
                reserved: 1024,
                threads: 2048,
                blocks: 32,
                clock: 1_410_000,
                memory_clock: 1_512_000,
                bus: 5120,
            },
            _ => Facts {
                processors: 132,
                l2: 50 << 20,
                shared_block: 227 << 10,
                shared_processor: 228 << 10,
                reserved: 1024,
                threads: 2048,
                blocks: 32,
                clock: 1_980_000,
                memory_clock: 2_619_000,
                bus: 5120,
            },
        }
    }

    /// Multiprocessors.
    pub fn processors(&self) -> u32 {
        self.facts().processors as u32
    }

    /// Dynamic and static shared memory that one block may have when it asks for it.
    pub fn shared_optin(&self) -> u32 {
        self.facts().shared_block as u32
    }

    /// Blocks that fit one multiprocessor, by threads and shared memory.
    pub fn occupancy(&self, threads: u32, shared: u32) -> i32 {
        let facts = self.facts();
        let warps = threads.div_ceil(32).max(1) as i32;
        let by_threads = facts.threads / 32 / warps;
        let each = shared as i32 + facts.reserved;
        let by_shared = if each == 0 { facts.blocks } else { facts.shared_processor / each };
        by_threads.min(by_shared).min(facts.blocks)
    }

    /// A device attribute by its number in `CUdevice_attribute`.
    pub fn attribute(&self, attribute: i32) -> Option<i32> {
        let facts = self.facts();
        Some(match attribute {
            1..=3 => 1024,
            4 => 64,
            5 => i32::MAX,
            6 | 7 => 65_535,
            8 => 48 << 10,
            9 => 64 << 10,
            10 => 32,
            11 => i32::MAX,
            12 | 82 => 65_536,
            13 => facts.clock,
            14 => 512,
            15 | 31 | 32 | 41 | 78 | 79 | 80 | 95 => 1,
            16 => facts.processors,
            // No time-out, not integrated, no mapped host memory, default mode, bus numbers,
            // no managed or pageable memory, no virtual memory management, no clusters and no
            // tensor maps: what is not modelled is not offered.
            17 | 18 | 19 | 20 | 34 | 35 | 50 | 83 | 84 | 88 | 89 | 102 | 120 | 127 => 0,
            33 => 1,
            36 => facts.memory_clock,
            37 => facts.bus,
            38 => facts.l2,
            39 => facts.threads,
            40 => 2,
            75 => (self.arch / 10) as i32,
            76 => (self.arch % 10) as i32,
            81 => facts.shared_processor,
            97 => facts.shared_block,
            106 => facts.blocks,
            108 | 109 => 0,
            111 => facts.reserved,
            115 => i32::from(self.pools),
            _ => return None,
        })
    }
}

struct Facts {
    processors: i32,
    l2: i32,
    shared_block: i32,
    shared_processor: i32,
    reserved: i32,
    threads: i32,
    blocks: i32,
    clock: i32,
    memory_clock: i32,
    bus: i32,
}

fn bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let (digits, shift) = match text.chars().last()? {
        'k' | 'K' => (&text[..text.len() - 1], 10),
        'm' | 'M' => (&text[..text.len() - 1], 20),
        'g' | 'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_errors() {
        let config = Config::from_vars(&|_| None).unwrap();
        assert_eq!((config.arch, config.devices, config.init), (90, 1, 0));
        assert_eq!(config.attribute(75), Some(9));
        assert_eq!(config.attribute(9999), None);
        let bad = Config::from_vars(&|n| (n == "MEMORY").then(|| "12Q".into()));
        assert!(bad.unwrap_err().contains("PW_EMULATOR_MEMORY"));
        for gap in ["1K", "128G", "far"] {
            let bad = Config::from_vars(&|n| (n == "GAP").then(|| gap.into()));
            assert!(bad.unwrap_err().contains("PW_EMULATOR_GAP"));
        }
        let far = Config::from_vars(&|n| (n == "GAP").then(|| "16G".into())).unwrap();
        assert_eq!((config.gap, far.gap), (64 << 10, 16 << 30));
        let small = Config::from_vars(&|n| match n {
            "MEMORY" => Some("64M".into()),
            "ARCH" => Some("sm_75".into()),
            "DRIVER" => Some("12020".into()),
            _ => None,
        })
        .unwrap();
        assert_eq!((small.memory, small.arch, small.ptx_version()), (64 << 20, 75, 82));
        assert_eq!(small.occupancy(256, 20 << 10), 3);
    }
}
