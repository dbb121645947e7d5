/// How an answer is drawn; what is nil is left to the server.
public struct AnswerOptions: Sendable, Hashable, Encodable {
    /// Longest answer, in tokens.
    public var maxTokens: Int?
    /// 0 always takes the likeliest token; up to 2.
    public var temperature: Double?
    /// Draw from the likeliest tokens of this much probability together.
    public var topP: Double?
    /// Makes an answer repeatable.
    public var seed: Int?
    /// The answer ends before the first of these; at most four.
    public var stop: [String]?
    /// Taken from the logits of tokens that the answer holds already; -2 to 2.
    public var presencePenalty: Double?
    /// Taken from them as often as the answer holds them; -2 to 2.
    public var frequencyPenalty: Double?
    /// Added to the logits of tokens, by their ids.
    public var logitBias: [Int: Double]?

    public init(
        maxTokens: Int? = nil,
        temperature: Double? = nil,
        topP: Double? = nil,
        seed: Int? = nil,
        stop: [String]? = nil,
        presencePenalty: Double? = nil,
        frequencyPenalty: Double? = nil,
        logitBias: [Int: Double]? = nil
    ) {
        self.maxTokens = maxTokens
        self.temperature = temperature
        self.topP = topP
        self.seed = seed
        self.stop = stop
        self.presencePenalty = presencePenalty
        self.frequencyPenalty = frequencyPenalty
        self.logitBias = logitBias
    }

    private enum CodingKeys: String, CodingKey {
        case maxTokens = "max_completion_tokens"
        case temperature
        case topP = "top_p"
        case seed, stop
        case presencePenalty = "presence_penalty"
        case frequencyPenalty = "frequency_penalty"
        case logitBias = "logit_bias"
    }
}

/// The body of a question.
struct Question: Encodable {
    let messages: [Message]
    let options: AnswerOptions

    private enum Keys: String, CodingKey {
        case messages, stream
        case streamOptions = "stream_options"
    }

    func encode(to encoder: any Encoder) throws {
        try options.encode(to: encoder)
        var fields = encoder.container(keyedBy: Keys.self)
        try fields.encode(messages, forKey: .messages)
        try fields.encode(true, forKey: .stream)
        try fields.encode(["include_usage": true], forKey: .streamOptions)
    }
}
