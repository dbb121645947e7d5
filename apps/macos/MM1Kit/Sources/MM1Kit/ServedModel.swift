/// A served model.
public struct ServedModel: Sendable, Hashable, Codable {
    /// What it can do.
    public struct Abilities: Sendable, Hashable, Codable {
        /// Whether it answers chats.
        public let answers: Bool
        /// Whether it has embeddings.
        public let embeds: Bool
        /// Tokens of a prompt and its answer together.
        public let context: Int?
        /// What ``Picture/Detail`` chooses from, nil where it takes no pictures.
        public let resolution: Modes?
    }

    /// Resolutions, such as `378` for one tile or `4-9x672` for tiles by the picture's shape.
    public struct Modes: Sendable, Hashable, Codable {
        public let low: String
        public let auto: String
        public let high: String
    }

    public let id: String
    public let mm1: Abilities
}

struct ServedModels: Decodable {
    let data: [ServedModel]
}

/// Whether a server is well.
public struct Health: Sendable, Hashable, Codable {
    public enum Status: String, Sendable, Codable {
        case ok, failed
    }

    public let status: Status
    public let model: String
    /// Whether the model is in memory; if not, the next question loads it.
    public let loaded: Bool
}
