"""A reward server as the process of the reward sources sees it."""

import asyncio
import json
import threading

import httpx
from pydantic import ValidationError

from actors.attempts import Fault, first_line
from minigpt_ray.config import HttpReward
from minigpt_ray.reward_protocol import ScoreAnswer, request_of
from minigpt_ray.rl.rollout import Rollout

TROUBLE = (408, 429)
"""Statuses below 500 that say something about the server, not about the samples."""


class RewardServer:
    """Posts samples and reads scores, with a limit on seconds and bytes. May be called from several threads."""

    def __init__(self, config: HttpReward, token: str | None) -> None:
        self.config = config
        authorization = {} if token is None else {"Authorization": f"Bearer {token}"}
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **authorization}
        self.client = httpx.AsyncClient(headers=headers, timeout=config.timeout_s, follow_redirects=False)
        self.loop = asyncio.new_event_loop()  # asyncio can end a request at a deadline, wherever it stands
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def __call__(self, rollouts: list[Rollout]) -> list[float]:
        """Raises Fault."""
        body = json.dumps(request_of(rollouts).model_dump()).encode()
        status, content = asyncio.run_coroutine_threadsafe(self._post(body), self.loop).result()
        if status != 200:
            said = content[:200].decode(errors="replace").strip()
            raise Fault("lost" if status >= 500 or status in TROUBLE else "errors", f"{self.config.url} answered with status {status}: {said!r}")
        try:
            scores = ScoreAnswer.model_validate_json(content).scores
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"])) or "the answer"
            raise Fault(
                "errors", f'{self.config.url} answered with something else than {{"scores": [number or null, ...]}}: {place}: {problem["msg"]}'
            ) from None
        return [float("nan") if score is None else score for score in scores]

    async def _post(self, body: bytes) -> tuple[int, bytes]:
        """Status and content."""
        url, content = self.config.url, bytearray()
        try:
            async with asyncio.timeout(self.config.timeout_s), self.client.stream("POST", url, content=body) as response:
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > self.config.max_response_bytes:
                        raise Fault("errors", f"{url} answered with more than max_response_bytes={self.config.max_response_bytes}")
                return response.status_code, bytes(content)
        except (TimeoutError, httpx.TimeoutException):
            raise Fault("timeouts", f"{url} gave no answer within timeout_s={self.config.timeout_s:g}") from None
        except httpx.TransportError as error:
            raise Fault("lost", f"{url} could not be reached ({first_line(error)})") from None
